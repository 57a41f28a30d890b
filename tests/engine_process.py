"""One engine in a process of its own, for tests: the environment that keeps it small, and what it prints last."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import Any


def free_port() -> int:
    """A TCP port of this host that nobody listens on at this moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def environment(port: int) -> dict[str, str]:
    """The environment of an engine on one thread whose NIXL side channel is `port`."""
    return os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port),
    }


def run_module(*arguments: str, timeout_s: float = 100) -> dict[str, Any]:
    """Runs a module of the tests with its arguments; returns the last JSON object that it prints."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        env=environment(free_port()), capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(lines[-1])
    return told

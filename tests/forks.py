"""A process that has imported vLLM once, and forks for each module of the tests that runs an engine of its own.

`python -m tests.forks` is that process. It imports nothing of ours, so that what it forks may also be plain vLLM, and
runs no thread. A line of JSON in, `{"module", "arguments", "stdin", "env", "timeout_s"}`, is answered by one line,
`{"status", "stdout", "stderr"}`; `status` is None where the time was up. `Forks` is the tests' side of it.
"""

from __future__ import annotations

import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any, Self

ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
}
# What pipelines in the tests' process have set for their own daemons, and plain vLLM does not have.
PIPELINES_OWN = ("VLLM_SSM_CONV_STATE_LAYOUT", "VLLM_LOGGING_LEVEL", "VLLM_CONFIGURE_LOGGING")


def free_port() -> int:
    """A TCP port of this host that nobody listens on at this moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def environment(port: int) -> dict[str, str]:
    """The environment of an engine on one thread that is no part of a pipeline; its NIXL side channel is `port`."""
    inherited = {name: value for name, value in os.environ.items() if name not in PIPELINES_OWN}
    return inherited | ENV | {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(port)}


class Forks:
    """Runs one module after the other while it is entered as a context manager."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks"],
            env=environment(free_port()), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._lock = threading.Lock()
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(self, module: str, *arguments: str, stdin: str = "", timeout_s: float = 100) -> Any:
        """What a module prints last, which is JSON; called from several threads, they wait for each other."""
        port = {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
        task = {"module": module, "arguments": arguments, "stdin": stdin, "env": port, "timeout_s": timeout_s}
        with self._lock:
            assert self._process.stdin is not None and self._process.stdout is not None
            self._process.stdin.write(json.dumps(task) + "\n")
            self._process.stdin.flush()
            told = json.loads(self._process.stdout.readline())
        lines = [line for line in told["stdout"].splitlines() if line.startswith(("{", "["))]
        assert told["status"] == 0 and lines, f"{module}: status {told['status']}\n{told['stderr']}"
        return json.loads(lines[-1])


def main() -> None:
    """Serves until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch
    import vllm.distributed.kv_transfer.kv_connector.v1.nixl
    import vllm.entrypoints.llm
    import vllm.v1.engine.core  # noqa: F401

    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), file=answers)


def run(task: dict[str, Any]) -> dict[str, Any]:
    """Forks for a task, and waits for its end or its time."""
    with tempfile.TemporaryDirectory(prefix="forks-") as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        child = os.fork()
        if child == 0:
            _become(task, out, err)
        descriptor = os.pidfd_open(child)
        in_time = bool(select.select([descriptor], [], [], task["timeout_s"])[0])
        if not in_time:
            os.kill(child, signal.SIGKILL)
        os.close(descriptor)
        _, status = os.waitpid(child, 0)
        ended = os.waitstatus_to_exitcode(status) if in_time else None
        return {"status": ended, "stdout": out.read_text(), "stderr": err.read_text()[-3000:]}


def _become(task: dict[str, Any], out: Path, err: Path) -> None:
    """Turns the forked child into the module; never returns."""
    status = 1
    try:
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.environ.update(task["env"])
        sys.stdin, sys.argv = io.StringIO(task["stdin"]), [task["module"], *task["arguments"]]
        runpy.run_module(task["module"], run_name="__main__", alter_sys=True)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()

"""Processes that the tests of this folder start: plain vLLM, and makers of models."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any, Self

ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
}
# What pipelines in this process have set for their own daemons, and plain vLLM does not have.
PIPELINES_OWN = ("VLLM_SSM_CONV_STATE_LAYOUT",)


def environment() -> dict[str, str]:
    """The environment of a process that is no part of a pipeline."""
    return {name: value for name, value in os.environ.items() if name not in PIPELINES_OWN} | ENV


def python(*arguments: str, stdin: str = "") -> str:
    """Runs a module of the tests in a process of its own; returns what it printed last."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        input=stdin,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().rpartition("\n")[2]


class PlainVllm:
    """A process that answers for one model after the other (`tests.models.plain`); enter it."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.models.plain"],
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def answers(self, task: dict[str, Any]) -> list[dict[str, Any]]:
        """The answers to `{"model", "engine", "max_tokens", "chats"}`; why there are none goes to stderr."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        found: list[dict[str, Any]] | None = json.loads(self._process.stdout.readline())
        assert found is not None, "plain vLLM failed; see what it wrote to stderr"
        return found

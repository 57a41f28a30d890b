"""Two real engines in processes of their own (see kv_engine.py), one that prefills and one that decodes."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.forks import environment, free_port

WITHIN_S = 8.0
_ids = itertools.count()


class RemoteEngine:
    """An engine's process, and its commands as methods."""

    def __init__(self, role: str, log: Path, port: int) -> None:
        self.role, self.log, self.port = role, log, port
        with log.open("a") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.workers.kv_engine", role],
                env=environment(port), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=out, text=True,
            )  # fmt: skip

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout
        if line := self.process.stdout.readline():
            told: dict[str, Any] = json.loads(line)
            return told
        raise AssertionError(f"the {self.role} engine is gone:\n{self.log.read_text()[-3000:]}")

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            assert self.process.stdin
            self.process.stdin.write(json.dumps([name, *arguments]) + "\n")
            self.process.stdin.flush()
            return self.answer()["result"]

        return call

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                stream and stream.close()


class Pair:
    """A prefill and a decode engine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.p = RemoteEngine("prefill", folder / "prefill.log", free_port())
        self.d = RemoteEngine("decode", folder / "decode.log", free_port())
        self.p.answer(), self.d.answer()
        self.peer = self.p.peer()
        self.truth = self.undisturbed()

    def begin(self, num_tokens: int = 4, samples: bool = False) -> str:
        """A request at both; decode has registered for its KV, prefill has not computed anything.

        With `samples` the first token is prefill's, and decode awaits it.
        """
        request_id = f"request-{next(_ids)}"
        self.p.add(request_id, num_tokens, None, samples)
        self.d.add(request_id, num_tokens, self.peer, samples)
        self.d.step(3)
        return request_id

    def undisturbed(self) -> list[int]:
        """The tokens of a request that nothing happens to."""
        request_id = self.begin()
        self.settle()
        tokens = self.d.state()["tokens"][request_id]
        assert len(tokens) == 4
        return tokens

    def settle(self, within_s: float = WITHIN_S) -> None:
        """Lets both run, in turns, until neither holds anything; fails with what they hold."""
        deadline = time.monotonic() + within_s
        while True:
            self.p.settle(0.1), self.d.settle(0.1)
            p, d = self.p.state(), self.d.state()
            if idle(p) and idle(d):
                return
            assert time.monotonic() < deadline, (p, d)

    def replace(self, name: str) -> None:
        """Starts an engine in place of one that is gone, on the same port."""
        old: RemoteEngine = getattr(self, name)
        old.close()
        new = RemoteEngine(old.role, old.log, old.port)
        setattr(self, name, new)
        new.answer()
        self.peer = self.p.peer()


def idle(state: dict[str, Any]) -> bool:
    return not (state["blocks"] or state["requests"] or state["has_requests"] or state["held"])

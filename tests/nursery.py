"""A process that has imported all that a zygote does, and forks the zygotes of the tests' pipelines: seconds for each.

`python -m tests.nursery FD` is that process; `Nursery` is the tests' side of it. A zygote of a pipeline that people run
imports vLLM itself, which takes most of its start (`epd.local.zygote`); tests of that, in tests/local, and `epd demo`
do without this. What comes through the socket FD is JSON with file descriptors; a pid goes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any, Self

from epd.local.environment import set_engine_environment
from epd.local.forker import Forker
from epd.process.activation import LISTEN_FD

_MAX_MESSAGE = 1 << 18


class Nursery:
    """While it is entered, pipelines that are started in this process have their zygotes forked."""

    def __enter__(self) -> Self:
        set_engine_environment("/")
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.nursery", str(theirs.fileno())], pass_fds=[theirs.fileno()]
            )
        self._lock = threading.Lock()
        self._usual = staticmethod(Forker.spawn)
        Forker.spawn = staticmethod(self.spawn)  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Forker.spawn = self._usual  # type: ignore[method-assign]
        self._sock.close()
        self._process.kill()
        self._process.wait()

    @contextlib.contextmanager
    def away(self) -> Iterator[None]:
        """While inside, zygotes start as those of people's pipelines do."""
        Forker.spawn = self._usual  # type: ignore[method-assign]
        try:
            yield
        finally:
            Forker.spawn = staticmethod(self.spawn)  # type: ignore[method-assign]

    async def spawn(self, arguments: list[str], fds: list[int], env: dict[str, str], log: int) -> Zygote:
        """As `Forker.spawn`."""
        told = {"arguments": arguments, "env": env}
        return Zygote(await asyncio.to_thread(self._ask, json.dumps(told).encode(), [log, *fds]))

    def _ask(self, message: bytes, fds: list[int]) -> int:
        with self._lock:
            socket.send_fds(self._sock, [message], fds)
            return int(self._sock.recv(64))


class Zygote:
    """A process that is not a child of this one, as far as a `Forker` wants to know it."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd: int | None = None
        with contextlib.suppress(ProcessLookupError):
            self._pidfd = os.pidfd_open(pid)

    async def wait(self) -> int:
        """Returns when it has ended; its status is not known here."""
        if self._pidfd is not None:
            loop, ended = asyncio.get_running_loop(), asyncio.Event()
            loop.add_reader(self._pidfd, ended.set)
            try:
                await ended.wait()
            finally:
                loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None
        return -1

    def kill(self) -> None:
        """Ends it at once.

        Raises:
            ProcessLookupError: it has ended.
        """
        if self._pidfd is None:
            raise ProcessLookupError
        signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)


def main(descriptor: int) -> None:
    """Serves until the tests' process is gone."""
    from epd.local.zygote import load_all

    sock = socket.socket(fileno=descriptor)
    sock.set_inheritable(False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them here
    load_all({"modules": ["epd.local.preload"]})
    while True:
        message, fds, _, _ = socket.recv_fds(sock, _MAX_MESSAGE, 4)
        if not message:
            return
        pid = os.fork()
        if pid == 0:
            sock.close()
            _become(json.loads(message), fds)
        for each in fds:
            os.close(each)
        sock.send(str(pid).encode())


def _become(told: dict[str, Any], fds: list[int]) -> None:
    """Turns the forked child into a zygote; never returns."""
    status = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log, sock, *listening = fds
        null = os.open(os.devnull, os.O_RDONLY)
        for number, each in ((0, null), (1, log), (2, log)):
            os.dup2(each, number)
        os.close(log)
        os.close(null)
        os.environ.clear()
        os.environ.update(told["env"] | ({LISTEN_FD: str(listening[0])} if listening else {}))
        tempfile.tempdir = None  # asked for before, under another TMPDIR
        from epd.local import zygote

        status = zygote.main([str(sock), *told["arguments"][1:]])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main(int(sys.argv[1]))

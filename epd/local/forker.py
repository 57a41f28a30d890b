"""The supervisor's side of the zygote: starts it, asks it to fork, and hears when its children end.

Lives in the supervisor's process; owns the zygote's process, the socket to it and the task that reads that.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from epd.local.daemon import Spec
from epd.local.environment import ORPHANED_S, python, scratch_environment
from epd.process.activation import LISTEN_FD

OnExit = Callable[[str, int, int], None]


class Process(Protocol):
    """What is wanted of the zygote's process, as asyncio's processes have it."""

    @property
    def pid(self) -> int:
        """Its id."""

    async def wait(self) -> int:
        """Returns its status when it has ended."""

    def kill(self) -> None:
        """Ends it at once."""


class ZygoteError(RuntimeError):
    """The zygote is gone, or could not import what it should have."""


class Forker:
    """Runs one zygote while it is entered as an async context manager.

    Args:
        preload: What the zygote imports and calls before it forks anything, see `epd.local.zygote`.
        run_dir: Where its log goes; swept by the zygote if this process dies.
        listening: A socket for the daemons that listen.
        on_exit: Called with name, pid and exit status of each forked process that has ended.
        on_lost: Called when the zygote has ended by itself, and all its forks with it.
    """

    def __init__(
        self,
        preload: dict[str, Any],
        run_dir: Path,
        *,
        on_exit: OnExit,
        on_lost: Callable[[], None],
        listening: socket.socket | None = None,
    ) -> None:
        self._preload, self._run_dir, self._listening = preload, run_dir, listening
        self._on_exit, self._on_lost = on_exit, on_lost
        self._forked: dict[str, asyncio.Future[int]] = {}
        self.imported: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self.num_threads = 0
        self.log_path = run_dir / "zygote.log"

    @staticmethod
    async def spawn(arguments: list[str], fds: list[int], env: dict[str, str], log: int) -> Process:
        """Starts the process that calls `epd.local.zygote.main`.

        Args:
            arguments: of `main`.
            fds: what it keeps: the socket to this process and, if any, the one to listen on.
            env: its whole environment.
            log: where its output goes.
        """
        return await asyncio.create_subprocess_exec(
            *python("-m", "epd.local.zygote", *arguments),
            pass_fds=fds,
            env=env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    async def __aenter__(self) -> Self:
        ours, theirs = socket.socketpair()
        listening = [] if self._listening is None else [self._listening.fileno()]
        with theirs, self.log_path.open("ab") as log:
            self._process = await self.spawn(
                [str(theirs.fileno()), str(self._run_dir), json.dumps(self._preload)],
                [theirs.fileno(), *listening],
                os.environ | scratch_environment(self._run_dir) | ({LISTEN_FD: str(listening[0])} if listening else {}),
                log.fileno(),
            )
        self._reader, self._writer = await asyncio.open_connection(sock=ours)
        self._task = asyncio.create_task(self._read(), name="zygote")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._writer.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.0 if not self.imported.done() else ORPHANED_S + 2.0):
                await self._process.wait()
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await self._process.wait()
        if not self.imported.done():
            self.imported.cancel()

    @property
    def pid(self) -> int:
        """The zygote's process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can fork."""
        return not self._task.done()

    async def fork(self, spec: Spec, env: dict[str, str], log_path: Path) -> int:
        """Forks a process that calls `spec.target`, once vLLM is imported. Returns its pid.

        Raises:
            ZygoteError: it cannot be forked.
        """
        await asyncio.shield(self.imported)
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._forked[spec.name] = future
        self._send(
            op="fork",
            name=spec.name,
            target=spec.target,
            args=spec.args,
            env=env,
            log=str(log_path),
            listens=spec.listens,
        )
        return await future

    def watch(self, pid: int) -> None:
        """Makes the zygote ensure that a process does not outlive this one."""
        with contextlib.suppress(ZygoteError):
            self._send(op="watch", pid=pid)

    def unwatch(self, pid: int) -> None:
        """Tells the zygote that the process has ended."""
        with contextlib.suppress(ZygoteError):
            self._send(op="unwatch", pid=pid)

    def _send(self, **command: Any) -> None:
        if not self.alive:
            raise ZygoteError("the zygote is gone")
        self._writer.write(json.dumps(command).encode() + b"\n")

    async def _read(self) -> None:
        message = ""
        with contextlib.suppress(ConnectionError):
            while line := await self._reader.readline():
                event = json.loads(line)
                match event["event"]:
                    case "imported":
                        self.imported.set_result(event["took_s"])
                        self.num_threads = event["num_threads"]
                    case "failed":
                        message = event["message"].strip()
                    case "forked":
                        if not (future := self._forked.pop(event["name"])).done():
                            future.set_result(event["pid"])
                    case "exited":
                        self._on_exit(event["name"], event["pid"], event["status"])
        status = await self._process.wait()
        self._fail(ZygoteError(message or f"the zygote ended with status {status}, see {self.log_path}"))
        self._on_lost()

    def _fail(self, error: ZygoteError) -> None:
        futures: list[asyncio.Future[Any]] = [self.imported, *self._forked.values()]
        for future in futures:
            if not future.done():
                future.set_exception(error)
                future.exception()  # retrieved, so that asyncio does not complain if nobody waits


def signal_quietly(pid: int, number: int) -> None:
    """Sends a signal to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)

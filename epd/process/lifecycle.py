"""The life of every daemon: logs and signals, READY and STOPPING for systemd, and an exit status.

Lives in every process; owns the loop and the signal handlers while `run` is active. What a daemon does is in its
`main`: it makes what it needs, calls `Life.ready`, waits in `Life.end`, drains, and returns the status.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator

import uvloop

from epd.config import LogConfig
from epd.process import logs

OK, FAILED, MISCONFIGURED = 0, 1, 2


class Life:
    """One daemon's life, as its supervisor sees it.

    Attributes:
        stop: set when the daemon is to finish what it has and end.
    """

    def __init__(self, stop: asyncio.Event | None = None) -> None:
        self.stop = stop or asyncio.Event()
        self._is_ready = False

    def ready(self) -> None:
        """The daemon works from now on; its supervisor is told once."""
        if not self._is_ready:
            self._is_ready = True
            notify_systemd("READY=1")

    async def end(self, *others: Awaitable[object]) -> bool:
        """Waits until the daemon is to stop or one of `others` is done; tells the supervisor that it is stopping.

        Then the others are cancelled; an error of one is raised here.

        Returns:
            Whether it ends without having been asked to.
        """
        try:
            await first(self.stop.wait(), *others)
        finally:
            notify_systemd("STOPPING=1")
        return not self.stop.is_set()


Main = Callable[[Life], Awaitable[int]]


def run(config: LogConfig, name: str, main: Main) -> int:
    """Runs the daemon `name` on uvloop; the first SIGINT or SIGTERM stops it, a second one ends the process at once.

    Returns:
        What `main` returns: the exit status.
    """
    logs.configure(config, name)
    return uvloop.run(_run(main))


async def _run(main: Main) -> int:
    life = Life()
    with _signals(life.stop):
        return await main(life)


@contextlib.contextmanager
def _signals(stop: asyncio.Event) -> Iterator[None]:
    """While entered, the first SIGINT or SIGTERM sets `stop`; the second exits with 128 + its number."""
    loop = asyncio.get_running_loop()

    def handle(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, handle, number)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


async def first(*waits: Awaitable[object]) -> None:
    """Returns when the first of these is done, and raises its error; the others are cancelled."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def notify_systemd(state: str) -> None:
    """Tells systemd `state` (READY=1, STATUS=…, STOPPING=1) if it started this process with a notify socket."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        sock.sendto(state.encode(), address)  # whoever started this process may be gone

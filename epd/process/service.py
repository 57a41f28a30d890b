"""What every daemon does around its work: logs, signals, the event loop, and leaving in good order.

Lives in every process; owns the loop and the signal handlers while `run` is active.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator

import structlog
import uvloop

from epd.config import LogConfig

Main = Callable[[asyncio.Event], Awaitable[int]]


def configure_logging(config: LogConfig, daemon: str) -> None:
    """Sends structlog to standard error as lines for people ("console") or machines ("json"), bound to `daemon`."""
    level = logging.getLevelNamesMapping().get(config.level.upper(), logging.INFO)
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if config.format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
    )
    structlog.contextvars.bind_contextvars(daemon=daemon)


def run(main: Main) -> int:
    """Runs `main(stop)` on uvloop; the first SIGINT or SIGTERM sets `stop`, a second one ends the process at once.

    Returns:
        What `main` returns: the exit status.
    """
    return uvloop.run(_run(main))


async def _run(main: Main) -> int:
    stop = asyncio.Event()
    with signals(stop):
        return await main(stop)


@contextlib.contextmanager
def signals(stop: asyncio.Event) -> Iterator[None]:
    """While inside, the first SIGINT or SIGTERM sets `stop`; the second exits with 128 + its number."""
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


def notify_systemd(state: str) -> None:
    """Tells systemd `state` (READY=1, STOPPING=1) where it started this process with a notify socket."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        sock.sendto(state.encode(), address)  # whoever started this process may be gone


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Asks Linux to send this process `number` when its parent dies, so that nothing is left behind."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, number)

"""What every daemon needs before its work begins: logs, and a way not to outlive who started it.

Lives in every process; owns structlog's configuration. How daemons start and stop is in `epd.process.lifecycle`.
"""

from __future__ import annotations

import ctypes
import logging
import signal
import sys

import structlog

from epd.config import LogConfig


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


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Asks Linux to send this process `number` when its parent dies, so that nothing is left behind."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, number)

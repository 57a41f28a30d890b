"""What a process logs: one line for each event on standard error, whoever says it, for people or for machines.

Lives in every process; owns structlog's configuration, the root handler of the standard library's logging and Python's
warnings. Libraries are heard from warnings on, each warning once: engines repeat theirs.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from typing import Any

import structlog

from epd.config import LogConfig

_MAX_SEEN = 1024
_METHODS = ("debug", "info", "warning", "error", "critical")
# Libraries that are as talkative as a variable of the environment says.
_LEVELS = {"vllm": "VLLM_LOGGING_LEVEL", "nixl": "NIXL_LOG_LEVEL"}


def configure(config: LogConfig, daemon: str) -> None:
    """Sends all that is logged to standard error as lines for people ("console") or machines ("json").

    Args:
        config: the format, and the level of our own events.
        daemon: who says it.
    """
    level = _level(config.level)
    is_json = config.format == "json"
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if is_json
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), sort_keys=False)
    )
    structlog.configure(
        processors=[
            _with_daemon(daemon),
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),
    )
    root = logging.getLogger()
    root.handlers = [Handler()]
    root.setLevel(logging.DEBUG if level <= logging.DEBUG else logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
    warnings.showwarning = _show_warning
    for library in _LEVELS:
        adopt(library)


def adopt(library: str) -> None:
    """Has a library that brings handlers of its own log as everybody does; to be called once it is imported."""
    logger = logging.getLogger(library)
    logger.handlers, logger.propagate = [], True
    level = os.environ.get(_LEVELS[library], "")
    logger.setLevel(_level(level) if level else logging.NOTSET)


def hear(*names: str) -> None:
    """Has these loggers heard from INFO on."""
    for name in names:
        logger = logging.getLogger(name)
        logger.setLevel(min(logger.getEffectiveLevel(), logging.INFO))


class Handler(logging.Handler):
    """Gives records of the standard library's logging to structlog; a warning that was told is not told again."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[tuple[str, str]] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Tells one record."""
        try:
            text = record.getMessage()
            if record.levelno == logging.WARNING and self._is_repeated(record.name, text):
                return
            tell(record.levelno, text, record.name, record.exc_info)
        except Exception:
            self.handleError(record)

    def _is_repeated(self, name: str, text: str) -> bool:
        if (name, text) in self._seen:
            return True
        if len(self._seen) < _MAX_SEEN:
            self._seen.add((name, text))
        return False


def tell(level: int, text: str, source: str, error: Any = None) -> None:
    """Writes one line for what a library has said."""
    name = logging.getLevelName(level).lower()
    say = getattr(structlog.get_logger(), name if name in _METHODS else "info")
    say(" ".join(text.splitlines()), source=source, **({"exc_info": error} if error else {}))


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Python's warnings as one line each; what they say of future versions is not for those who run this one."""
    if issubclass(category, DeprecationWarning | PendingDeprecationWarning | FutureWarning):
        return
    where = f"{os.path.basename(filename)}:{lineno}"
    logging.getLogger("py.warnings").warning("%s: %s (%s)", category.__name__, message, where)


def _with_daemon(daemon: str) -> structlog.typing.Processor:
    """Names the daemon in each event, in every thread."""

    def add(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        event.setdefault("daemon", daemon)
        return event

    return add


def _level(name: str) -> int:
    return logging.getLevelNamesMapping().get(name.upper(), logging.INFO)

"""What a process logs: one line for each event on standard error, whatever its source, for people or machines.

Lives in every process; owns structlog's configuration, the root handler of the standard library's logging and Python's
warnings. Of libraries, warnings and errors are logged, each warning once: engines repeat theirs.
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
# Libraries whose verbosity is set by an environment variable.
_LEVELS = {"vllm": "VLLM_LOGGING_LEVEL", "nixl": "NIXL_LOG_LEVEL"}


def configure(config: LogConfig, daemon: str) -> None:
    """Sends everything that is logged to standard error, as lines for people ("console") or machines ("json").

    Args:
        config: the format, and the level of our own events.
        daemon: the name that each line carries.
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
    """Makes a library that has its own handlers log like all others; call it once the library is imported."""
    logger = logging.getLogger(library)
    logger.handlers, logger.propagate = [], True
    level = os.environ.get(_LEVELS[library], "")
    logger.setLevel(_level(level) if level else logging.NOTSET)


def hear(*names: str) -> None:
    """Logs what these loggers say from INFO on."""
    for name in names:
        logger = logging.getLogger(name)
        logger.setLevel(min(logger.getEffectiveLevel(), logging.INFO))


class Handler(logging.Handler):
    """Passes records of the standard library's logging to structlog; repeats no warning."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[tuple[str, str]] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Passes on one record."""
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
    """Writes one line for a library's record."""
    name = logging.getLevelName(level).lower()
    say = getattr(structlog.get_logger(), name if name in _METHODS else "info")
    say(" ".join(text.splitlines()), source=source, **({"exc_info": error} if error else {}))


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Logs Python's warnings as one line each; those about future versions are not for people who run this one."""
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

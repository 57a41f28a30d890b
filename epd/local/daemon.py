"""One daemon of a local pipeline as its supervisor sees it: what to start, and how it is.

Lives in the supervisor's process; plain values.
"""

from __future__ import annotations

import asyncio
import enum
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class State(enum.StrEnum):
    """Where a daemon is in its life."""

    WAITING = "waiting"  # for the zygote to have imported vLLM
    LOADING = "loading"
    READY = "ready"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What to start.

    Attributes:
        name: Unique; the log is `<name>.log`.
        role: For people: "broker", "encode", ...
        argv: The command line of a separate process; empty for one that is forked from the zygote, which then
            calls `target` ("module:function") with `args`.
        env: Added to the environment.
        stop_rank: Daemons stop in ascending order of it, those of one rank together.
        stop_s: How long one may take to stop after SIGTERM.
        once: It is not a daemon but ends by itself, with status 0 if all went well.
        listens: It gets the supervisor's listening socket (`epd.process.activation`).
        tidies: It removes something outside its process when it ends, so even an immediate stop begins with SIGTERM.
    """

    name: str
    role: str
    argv: list[str] = field(default_factory=list)
    target: str = ""
    args: list[Any] = field(default_factory=list)
    env: dict[str, str] = field(default_factory=dict)
    stop_rank: int = 0
    stop_s: float = 10.0
    listens: bool = False
    tidies: bool = False
    once: bool = False


@dataclass(kw_only=True)
class Daemon:
    """A daemon: which process it is now, and how it is.

    Attributes:
        pid: 0 while there is none.
        status: Exit status of the last process: negative for the signal that ended it; None while it runs.
        detail: What the daemon said of itself last (systemd's STATUS=).
        took_s: From its start to READY, of the last process that got there.
        num_restarts: How often it has been started again.
    """

    spec: Spec
    log_path: Path
    pid: int = 0
    state: State = State.WAITING
    status: int | None = None
    detail: str = ""
    started_at: float = field(default_factory=time.monotonic)
    took_s: float = 0.0
    num_restarts: int = 0
    exited: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def name(self) -> str:
        """The daemon's name."""
        return self.spec.name

    @property
    def role(self) -> str:
        """What it does."""
        return self.spec.role

    @property
    def alive(self) -> bool:
        """Whether there is a process."""
        return bool(self.pid) and not self.exited.is_set()

    def how_it_ended(self) -> str:
        """For people: "was killed by SIGKILL", "exited with status 1"."""
        if self.status is None:
            return "has not ended"
        if self.status >= 0:
            return f"exited with status {self.status}"
        try:
            return f"was killed by {signal.Signals(-self.status).name}"
        except ValueError:
            return f"was killed by signal {-self.status}"

    def last_lines(self, count: int = 15) -> list[str]:
        """The end of its log."""
        try:
            with self.log_path.open("rb") as file:
                file.seek(max(0, self.log_path.stat().st_size - (64 << 10)))
                text = file.read().decode("utf-8", "replace")
        except OSError:
            return []
        return [line.rstrip() for line in text.splitlines() if line.strip()][-count:]


def last_line(error: BaseException) -> str:
    """The last line of an exception's text; of a traceback, the one that says what is wrong."""
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


class StartError(RuntimeError):
    """The pipeline did not become ready: a daemon ended, or it took too long.

    Attributes:
        daemon: Name of the daemon that ended; empty if it took too long.
        lines: The last lines of its log.
    """

    def __init__(self, message: str, daemon: str = "", lines: list[str] | None = None) -> None:
        super().__init__(message)
        self.daemon = daemon
        self.lines = lines or []

    def __str__(self) -> str:
        """The message, then the end of the log."""
        return "\n".join([str(self.args[0]), *(f"  | {line}" for line in self.lines)])

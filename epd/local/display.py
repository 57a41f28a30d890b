"""What a person sees while a pipeline starts, runs and stops.

Lives in the supervisor's process (`epd up`, `epd demo`); owns the terminal meanwhile. On a terminal the start is a
table that fills; elsewhere (a log, a pipe) each change is a line.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from epd.local.daemon import Daemon, State

_ENDLESS = 1 << 16  # columns
_REFRESH_S = 0.15
_TAIL_S = 0.2
_STYLES = {
    State.WAITING: "dim",
    State.LOADING: "yellow",
    State.READY: "green",
    State.STOPPING: "yellow",
    State.STOPPED: "dim",
    State.FAILED: "bold red",
}
_MARKS = {
    State.WAITING: "·",
    State.LOADING: "…",
    State.READY: "✓",
    State.STOPPING: "…",
    State.STOPPED: "-",
    State.FAILED: "✗",
}
_COLOURS = ("cyan", "magenta", "yellow", "blue", "green", "red", "bright_cyan", "bright_magenta")


def colour_of(index: int) -> str:
    """The colour of the n-th of several equal things; colours repeat."""
    return _COLOURS[index % len(_COLOURS)]


class PatientConsole(Console):
    """A console for people and for pipes.

    Without a terminal nothing is wrapped: a line stays a line for whatever reads it. When the terminal or pipe is gone
    it falls silent; rich's own console ends the process.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        if not self.is_terminal and "width" not in options:
            self.width = _ENDLESS

    def on_broken_pipe(self) -> None:
        """Nobody reads the output any more."""
        self.quiet = True


class Display:
    """Follows daemons; `on_change` is what a `LocalPipeline` calls as `progress`.

    Args:
        console: Where to.
        verbose: Also show the daemons' logs.
    """

    def __init__(self, console: Console, *, verbose: bool = False) -> None:
        self.console, self._verbose = console, verbose
        self._daemons: dict[str, Daemon] = {}
        self._started_at = time.monotonic()
        self._phase = "start"
        self._failed: set[str] = set()

    def print(self, *parts: Any, **options: Any) -> None:
        """Prints as `rich.console.Console.print` does; does not fail if the terminal is gone."""
        try:
            self.console.print(*parts, **options)
        except OSError:
            self.console.quiet = True

    def note(self, text: str) -> None:
        """Says something that the user should know, if there is anything."""
        if text:
            self.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)

    def on_change(self, daemon: Daemon) -> None:
        """A daemon's state has changed."""
        self._daemons[daemon.name] = daemon
        if self._phase == "start":
            if not self._is_live and daemon.state is not State.WAITING:
                self.print(f"{self._elapsed()}  {daemon.name:<10} {_says(daemon)}", highlight=False, soft_wrap=True)
        elif self._phase == "run":
            self._tell_run(daemon)

    @contextlib.asynccontextmanager
    async def starting(self) -> AsyncIterator[None]:
        """While entered, shows the progress of the start."""
        self._phase, self._started_at = "start", time.monotonic()
        try:
            if not self._is_live:
                yield
                return
            with Live(console=self.console, auto_refresh=False) as live:
                task = asyncio.create_task(self._refresh(live), name="progress")
                try:
                    yield
                finally:
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
                    with contextlib.suppress(OSError):
                        live.update(self._table(), refresh=True)
        finally:
            self._phase = "run"

    def stopping(self) -> None:
        """From now on daemons that end are not news."""
        self._phase = "stop"

    @contextlib.asynccontextmanager
    async def logs(self) -> AsyncIterator[None]:
        """While entered, shows the daemons' logs, if verbose."""
        if not self._verbose:
            yield
            return
        task = asyncio.create_task(self._tail(), name="tail-logs")
        try:
            yield
        finally:
            await asyncio.sleep(_TAIL_S)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    @property
    def _is_live(self) -> bool:
        return self.console.is_terminal and not self._verbose

    def _elapsed(self) -> str:
        return f"{time.monotonic() - self._started_at:6.1f} s"

    async def _refresh(self, live: Live) -> None:
        while True:
            live.update(self._table(), refresh=True)
            await asyncio.sleep(_REFRESH_S)

    def _table(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for daemon in self._daemons.values():
            style = _STYLES[daemon.state]
            table.add_row(Text(f" {_MARKS[daemon.state]}", style), daemon.name, Text(_says(daemon), style))
        table.add_row("", Text(self._elapsed().strip(), "dim"), "")
        return table

    def _tell_run(self, daemon: Daemon) -> None:
        if daemon.state is State.FAILED:
            self._failed.add(daemon.name)
            why = f" ({daemon.detail})" if daemon.detail else ""
            text = f"[red]✗[/] {daemon.name} {daemon.how_it_ended()}{escape(why)}; log: {daemon.log_path}"
            self.print(text, highlight=False, soft_wrap=True)
        elif daemon.state is State.READY and daemon.name in self._failed:
            self._failed.discard(daemon.name)
            self.print(f"[green]✓[/] {daemon.name} is back ({daemon.took_s:.1f} s)", highlight=False)

    async def _tail(self) -> None:
        offsets: dict[Path, int] = {}
        while True:
            self._show_new_lines(offsets)
            await asyncio.sleep(_TAIL_S)

    def _show_new_lines(self, offsets: dict[Path, int]) -> None:
        for index, path in enumerate(daemon.log_path for daemon in self._daemons.values()):
            offset = offsets.get(path, 0)
            with contextlib.suppress(OSError), path.open("rb") as file:
                file.seek(offset)
                text, newline, _ = file.read(1 << 20).rpartition(b"\n")
                offsets[path] = offset + len(text) + len(newline)
                for line in text.decode("utf-8", "replace").splitlines():
                    self.print(Text.assemble((f"{path.stem:>10} │ ", colour_of(index)), line), soft_wrap=True)


def _says(daemon: Daemon) -> str:
    match daemon.state:
        case State.WAITING:
            return "starting" if daemon.spec.argv else "importing vLLM"
        case State.READY:
            return f"ready ({daemon.took_s:.1f} s)"
        case State.FAILED:
            return daemon.how_it_ended()
    return str(daemon.state)

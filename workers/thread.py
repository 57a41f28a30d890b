"""The engine's thread: commands in, step reports out, asleep whenever there is nothing to do.

Lives in a worker process beside the event loop; owns the engine. Commands are callables that run between two steps.
After a step in which the model did not run, the thread sleeps until a command arrives or the stage's `poll_s` has
passed: a push that is under way has no event to wait for, patches that are being encoded do.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any, Protocol

Command = Callable[[], None]


class Steps(Protocol):
    """What the thread drives: the engine's side of a stage."""

    def start(self) -> None:
        """Builds the engine; runs first, in the thread."""

    def has_work(self) -> bool:
        """Whether a step could do anything."""

    def step(self) -> bool:
        """Makes one step and reports its results; returns whether the model ran."""

    def poll_s(self, num_idle_steps: int) -> float | None:
        """How long to sleep after that many steps without the model running; None until a command comes."""

    def held(self) -> dict[str, int]:
        """What is held now, by kind."""

    def gauges(self) -> dict[str, float]:
        """What it tells of itself for metrics."""

    def stop(self) -> None:
        """Frees the engine; runs last, in the thread."""


class EngineThread(threading.Thread):
    """Runs `steps` until `close`; `on_exit` is called in the thread with the error that ended it, or None."""

    def __init__(self, steps: Steps, on_ready: Callable[[], None], on_exit: Callable[[BaseException | None], None]):
        super().__init__(name="engine", daemon=True)
        self._steps, self._on_ready, self._on_exit = steps, on_ready, on_exit
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._idle = threading.Event()
        self.num_steps = 0
        # Replaced, never modified: other threads read them.
        self.held: dict[str, int] = {}
        self.gauges: dict[str, float] = {}

    def call(self, command: Callable[..., None], *args: Any) -> None:
        """Runs `command(*args)` between two steps; wakes the thread."""
        self._commands.put(lambda: command(*args))

    def wait_idle(self, timeout_s: float) -> bool:
        """Blocks until the engine has nothing to do or has ended; returns whether that was in time."""
        return self._idle.wait(timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Ends the thread after its current step; returns whether it ended in time."""
        self._commands.put(None)
        self.join(timeout_s)
        return not self.is_alive()

    def run(self) -> None:
        """The thread's body."""
        error: BaseException | None = None
        try:
            self._steps.start()
            self._on_ready()
            self._loop()
            self._steps.stop()
        except BaseException as caught:  # whatever ends the engine ends the worker
            error = caught
        self._idle.set()
        self._on_exit(error)

    def _loop(self) -> None:
        num_idle_steps = 0
        while True:
            wait_s: float | None = 0.0
            if not self._steps.has_work():
                wait_s = None
                self._idle.set()
            elif num_idle_steps:
                wait_s = self._steps.poll_s(num_idle_steps)
            commands = self._take(wait_s)
            self._idle.clear()
            if commands is None:
                return
            for command in commands:
                command()
            if commands:
                num_idle_steps = 0
            if self._steps.has_work():
                executed = self._steps.step()
                self.num_steps += 1
                num_idle_steps = 0 if executed else num_idle_steps + 1
            self.held, self.gauges = self._steps.held(), self._steps.gauges()

    def _take(self, wait_s: float | None) -> list[Command] | None:
        """The waiting commands; sleeps up to `wait_s` seconds (None: as long as it takes) for the first."""
        taken: list[Command] = []
        try:
            command = self._commands.get(timeout=wait_s) if wait_s != 0.0 else self._commands.get_nowait()
            while True:
                if command is None:
                    return None
                taken.append(command)
                command = self._commands.get_nowait()
        except queue.Empty:
            return taken

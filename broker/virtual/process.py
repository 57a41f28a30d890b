"""A process in virtual time: it can be killed, and starts again, and it can hang. Pure."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from broker.virtual.clock import Clock


class Process:
    """Something that lives, perhaps several times. Calls for a process that hangs wait until it goes on.

    Args:
        clock: the time.
        name: what it is called in all its lives.
        restart_s: how long its supervisor takes to restart it after its death; None for never.

    Attributes:
        life: counts its deaths.
        hangs: it is stopped, as by SIGSTOP.
        alive: it has not been killed, or was started again.
    """

    def __init__(self, clock: Clock, name: str, restart_s: float | None = 2.0) -> None:
        self.clock, self.name, self.restart_s = clock, name, restart_s
        self.life = 0
        self.hangs, self.alive = False, True
        self._calls: list[Callable[[], None]] = []

    def later(self, delay_s: float, call: Callable[[], None]) -> None:
        """Calls after a delay, if this life of the process has not ended by then."""
        self.clock.after(delay_s, partial(self._run, self.life, call))

    def _run(self, life: int, call: Callable[[], None]) -> None:
        if life != self.life:
            return
        if self.hangs:
            self._calls.append(partial(self._run, life, call))
        else:
            call()

    def start(self) -> None:
        """Begins a life."""

    def died(self) -> None:
        """What goes with it."""

    def hang(self, for_s: float) -> None:
        """Acts like SIGSTOP, and SIGCONT after a while."""
        self.hangs = True
        self.clock.after(for_s, self._go_on)

    def _go_on(self) -> None:
        self.hangs = False
        waiting, self._calls = self._calls, []
        for call in waiting:
            call()

    def kill(self) -> None:
        """Acts like SIGKILL; the supervisor restarts it."""
        self.end()
        if self.restart_s is not None:
            self.later(self.restart_s, self._start_again)

    def end(self) -> None:
        """Its life ends, and nobody starts it again."""
        self.life += 1
        self.hangs, self.alive, self._calls = False, False, []
        self.died()

    def _start_again(self) -> None:
        self.alive = True
        self.start()

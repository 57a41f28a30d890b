"""Virtual time: a heap of what happens when. Pure; whoever makes one owns it."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable


class Clock:
    """Calls what is due, in order of time; at the same time, in the order in which it was asked for.

    Attributes:
        now: seconds since the beginning; it moves only by `run`, `run_until` and `run_until_idle`.
        num_events: how many calls it has made.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self.num_events = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def __len__(self) -> int:
        return len(self._heap)

    def after(self, delay_s: float, call: Callable[[], None]) -> None:
        """Calls after a delay; if that is not positive, at once (but not before this returns)."""
        heapq.heappush(self._heap, (self.now + max(delay_s, 0.0), next(self._order), call))

    def run(self, seconds: float) -> None:
        """Lets that much time pass."""
        until = self.now + seconds
        while self._heap and self._heap[0][0] <= until:
            self._next()
        self.now = until

    def run_until(self, is_done: Callable[[], bool], within_s: float) -> bool:
        """Lets time pass until `is_done`, asked after each event, or the time is up; returns whether it is done."""
        until = self.now + within_s
        while not is_done():
            if not self._heap or self._heap[0][0] > until:
                self.now = until
                return False
            self._next()
        return True

    def run_until_idle(self) -> None:
        """Lets time pass until nothing is left to come. While peers send heartbeats, that is never."""
        while self._heap:
            self._next()

    def _next(self) -> None:
        self.now, _, call = heapq.heappop(self._heap)
        self.num_events += 1
        call()

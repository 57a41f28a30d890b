"""What the core does when time has passed, in the order in which it is due. Pure: the caller says what time it is.

Setting, stopping and running a timer cost O(log n) amortised.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

_MIN_STALE = 64


class Timer:
    """One thing to do at `at` (seconds of the core's clock); `call` gets the time, and is None once stopped or run."""

    __slots__ = ("at", "call")

    def __init__(self, at: float, call: Callable[[float], None]) -> None:
        self.at = at
        self.call: Callable[[float], None] | None = call


class Timers:
    """All timers that are set."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._num_stopped = 0

    def __len__(self) -> int:
        return len(self._heap) - self._num_stopped

    def set(self, at: float, call: Callable[[float], None]) -> Timer:
        """Has `call(now)` called at the first `run` at or after `at`; at equal times, what was set first goes first."""
        timer = Timer(at, call)
        heapq.heappush(self._heap, (at, next(self._order), timer))
        return timer

    def stop(self, timer: Timer | None) -> None:
        """Keeps a timer from running; nothing happens if it has run or was stopped."""
        if timer is None or timer.call is None:
            return
        timer.call = None
        self._num_stopped += 1
        if self._num_stopped > len(self._heap) // 2 + _MIN_STALE:
            self._heap = [entry for entry in self._heap if entry[2].call is not None]
            heapq.heapify(self._heap)
            self._num_stopped = 0

    def run(self, now: float) -> None:
        """Calls what is due, including what is set meanwhile and due at once."""
        while self._heap and self._heap[0][0] <= now:
            timer = heapq.heappop(self._heap)[2]
            call, timer.call = timer.call, None
            if call is None:
                self._num_stopped -= 1
            else:
                call(now)

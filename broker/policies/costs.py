"""What a worker's work costs, learnt from what it reports. Pure.

Workers report with each heartbeat how many seconds their engines have been busy, and for how many units of work:
embedding rows, prompt tokens or decoded tokens. The increase since the last heartbeat gives seconds per unit, smoothed.
"""

from __future__ import annotations

from epd.messages import Work

_WEIGHT = 0.2
# Fewer units than this between two heartbeats say little: they are counted with the next ones.
_MIN_UNITS = 16


class Cost:
    """Seconds per unit of one worker's work; 0 while nothing is known."""

    __slots__ = ("_last", "s_per_unit")

    def __init__(self) -> None:
        self._last = Work()
        self.s_per_unit = 0.0

    def observe(self, work: Work) -> bool:
        """Takes in the worker's total so far; returns whether the estimate has changed."""
        num_units, busy_s = work.num_units - self._last.num_units, work.busy_s - self._last.busy_s
        if num_units < 0 or busy_s < 0.0:  # totals start over when it serves another stage
            self._last = work
            return False
        if num_units < _MIN_UNITS or busy_s == 0.0:
            return False
        self._last = work
        found = busy_s / num_units
        self.s_per_unit = found if not self.s_per_unit else self.s_per_unit + _WEIGHT * (found - self.s_per_unit)
        return True

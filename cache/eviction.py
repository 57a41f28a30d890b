"""The order in which cached patches are evicted: GreedyDual-Size, which is LRU if all cost the same per byte.

Lives in the broker's decision core; pure. A patch's priority is the clock at its last use plus what encoding it again
costs per byte; the clock is the highest priority evicted so far, so what is not used ages. (P. Cao, S. Irani,
"Cost-Aware WWW Proxy Caching Algorithms", USITS 1997.)
"""

from __future__ import annotations

import heapq
from typing import NamedTuple


class Rank(NamedTuple):
    """A place in the order: the lowest goes first, and of equal priorities the least recently used."""

    priority: float
    order: int


class Clock:
    """Hands out ranks; one for all queues whose ranks are compared."""

    def __init__(self) -> None:
        self._now = 0.0
        self._order = 0

    def rank(self, cost_per_byte: float) -> Rank:
        """The rank of something used now."""
        self._order += 1
        return Rank(self._now + cost_per_byte, self._order)

    def advance(self, rank: Rank) -> None:
        """Notes that something of this rank was evicted."""
        self._now = max(self._now, rank.priority)


class EvictionQueue:
    """What may be evicted, by rank. Putting and removing cost O(log n) amortized."""

    def __init__(self) -> None:
        self._ranks: dict[str, Rank] = {}
        self._heap: list[tuple[Rank, str]] = []  # may hold keys that have been removed or have another rank by now

    def __len__(self) -> int:
        return len(self._ranks)

    def __contains__(self, key: str) -> bool:
        return key in self._ranks

    def put(self, key: str, rank: Rank) -> None:
        """Adds `key`, or gives it another rank."""
        self._ranks[key] = rank
        heapq.heappush(self._heap, (rank, key))
        if len(self._heap) > 2 * len(self._ranks) + 64:
            self._heap = [(rank, key) for key, rank in self._ranks.items()]
            heapq.heapify(self._heap)

    def remove(self, key: str) -> Rank | None:
        """Removes `key` and returns its rank, or None if it is not here."""
        return self._ranks.pop(key, None)

    def lowest(self) -> tuple[Rank, str] | None:
        """The next to be evicted, left in place."""
        while self._heap:
            rank, key = self._heap[0]
            if self._ranks.get(key) == rank:
                return rank, key
            heapq.heappop(self._heap)
        return None

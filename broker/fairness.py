"""A queue that is fair among tenants: start-time fair queueing, first come first served inside each tenant. Pure.

Each tenant has a line of its own, and a tag: how much of the service it has used up. The tenant with the lowest tag is
next, and what is taken adds its cost to the tag. A virtual clock shows what each waiting tenant should have got by now;
a tenant that comes (back) starts there, so that nobody saves up service while away, and nobody waits for ever while
others come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T", bound=int | str)


class FairQueue(Generic[T]):
    """Items that wait, by tenant, each with its cost in any unit.

    What is put back by `push_front` comes before everything else, in its old order: it has had its turn before. An
    item that was chosen and could not be taken yet stays the next one, whoever comes, so that it cannot starve.
    """

    def __init__(self) -> None:
        self._front: deque[T] = deque()
        self._lines: dict[str, deque[T]] = {}
        self._items: dict[T, tuple[str, float]] = {}  # tenant and cost
        self._tags: dict[str, float] = {}
        self._clock = 0.0
        self._chosen: T | None = None

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, item: T) -> bool:
        return item in self._items

    def __iter__(self) -> Iterator[T]:
        yield from self._front
        for line in self._lines.values():
            yield from line

    def push(self, tenant: str, item: T, cost: float) -> None:
        """Puts an item at the end of its tenant's line."""
        self._items[item] = (tenant, cost)
        if tenant not in self._lines:
            self._lines[tenant] = deque()
            self._tags[tenant] = max(self._clock, self._tags.get(tenant, 0.0))
        self._lines[tenant].append(item)

    def push_front(self, tenant: str, item: T) -> None:
        """Puts an item that has been taken before back, behind the others that were; it costs nothing again."""
        self._items[item] = (tenant, 0.0)
        self._front.append(item)

    def remove(self, item: T) -> None:
        """Takes an item out without serving it; nothing happens where it is not here."""
        tenant, _ = self._items.pop(item, ("", 0.0))
        if self._chosen == item:
            self._chosen = None
        if item in self._front:
            self._front.remove(item)
        elif (line := self._lines.get(tenant)) is not None and item in line:
            line.remove(item)
            self._tidy(tenant)

    def next(
        self, eligible: Callable[[T], bool] = lambda _: True, first: Callable[[T], bool] = lambda _: False
    ) -> T | None:
        """The item whose turn it is among those that are `eligible`; the same one until it is taken or removed.

        Args:
            eligible: false for what waits for something else than its turn, and may be passed by.
            first: true for what comes first among the items that have been put back.
        """
        if front := sorted(filter(eligible, self._front), key=lambda item: not first(item)):
            return front[0]
        if self._chosen is not None and eligible(self._chosen):
            return self._chosen
        heads = [
            (self._tags[tenant], number, item)
            for number, (tenant, line) in enumerate(self._lines.items())
            if (item := next(filter(eligible, line), None)) is not None
        ]
        self._chosen = min(heads, key=lambda head: head[:2])[2] if heads else None
        return self._chosen

    def take(self, item: T) -> None:
        """Serves an item that `next` gave: its tenant is charged for it."""
        tenant, cost = self._items[item]
        if item not in self._front:
            self._clock = max(self._clock, self._tags[tenant]) + cost / len(self._lines)
            self._tags[tenant] += cost
        self.remove(item)

    def count(self, tenant: str) -> int:
        """How many items of a tenant wait that have not been taken before."""
        return len(self._lines.get(tenant, ()))

    def newest_of_longest(self) -> tuple[str, T] | None:
        """The tenant with the longest line, and the item at its end; None where all lines are empty."""
        if not self._lines:
            return None
        tenant = max(self._lines, key=lambda one: len(self._lines[one]))
        return tenant, self._lines[tenant][-1]

    def _tidy(self, tenant: str) -> None:
        """Forgets an empty line, and the tags that the clock has passed: their tenants start anew without a loss."""
        if not self._lines[tenant]:
            del self._lines[tenant]
        if len(self._tags) > 2 * len(self._lines) + 64:
            self._tags = {one: tag for one, tag in self._tags.items() if one in self._lines or tag > self._clock}

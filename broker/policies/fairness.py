"""A queue that is fair among tenants: start-time fair queueing, and inside each tenant any order. Pure.

Each tenant has its own line and a tag: how much service it has used. The tenant with the lowest tag is next, and each
item that is taken adds its cost to the tag. A virtual clock shows how much service each waiting tenant should have had
by now. A tenant that arrives or comes back starts at the clock: if its tag stayed behind, it could save up service
while it is away and then keep everybody else waiting; if it started higher, it would pay for what others have used.

Items have a class: what they need before they can be served. Whoever asks for the next item names the classes that
cannot be served now, and their items are passed over. Every operation costs O(log n) amortised, times the number of
classes in use.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Collection, Iterator
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T", bound=int | str)

_MIN_STALE = 64


class _Item(NamedTuple):
    tenant: str
    cost: float
    needs: str  # its class
    number: int  # of this stay in the queue


class _Heap(Generic[T]):
    """Items of one class and tenant, or put back: by key, then arrival.

    Removing an item from the middle of a heap would cost a scan. So items that have left stay, are skipped when they
    come to the top, and are swept out when they outnumber the others.
    """

    __slots__ = ("_entries", "num_items")

    def __init__(self) -> None:
        self._entries: list[tuple[float, int, T]] = []
        self.num_items = 0

    def push(self, key: float, number: int, item: T) -> None:
        heapq.heappush(self._entries, (key, number, item))
        self.num_items += 1

    def left(self, items: dict[T, _Item]) -> None:
        """One of its items is no longer in `items`."""
        self.num_items -= 1
        if len(self._entries) > 2 * self.num_items + _MIN_STALE:
            self._entries = [entry for entry in self._entries if _is_current(entry, items)]
            heapq.heapify(self._entries)

    def first(self, items: dict[T, _Item]) -> tuple[float, int, T] | None:
        entries = self._entries
        while entries:
            if _is_current(entries[0], items):
                return entries[0]
            heapq.heappop(entries)
        return None


def _is_current(entry: tuple[float, int, T], items: dict[T, _Item]) -> bool:
    # An item that has left may be back, perhaps with another key: the number tells its stays apart.
    known = items.get(entry[2])
    return known is not None and known.number == entry[1]


class _Line(Generic[T]):
    """A tenant's waiting items: in order of arrival, and by class.

    `number` says how early the tenant came, `ranked` by which tag it is ranked in each class.
    """

    __slots__ = ("by_class", "items", "number", "ranked")

    def __init__(self, number: int) -> None:
        self.number = number
        self.items: dict[T, None] = {}
        self.by_class: dict[str, _Heap[T]] = {}
        self.ranked: dict[str, float] = {}


class FairQueue(Generic[T]):
    """Waiting items by tenant, each with its cost in any unit.

    Items that `push_front` puts back come before everything else: they have had their turn. An item that was chosen but
    could not be taken yet stays the next one, whoever arrives; otherwise a large one could starve.

    Args:
        knows_longest: whether `newest_of_longest` will be called.
    """

    def __init__(self, *, knows_longest: bool = False) -> None:
        self._knows_longest = knows_longest
        self._items: dict[T, _Item] = {}
        self._front: dict[str, _Heap[T]] = {}  # by class
        self._put_back: set[T] = set()
        self._lines: dict[str, _Line[T]] = {}
        self._tags: dict[str, float] = {}
        self._ranks: dict[str, list[tuple[float, int, str]]] = {}  # by class: tag, number and name of tenants
        self._by_length: dict[int, dict[str, None]] = {}
        self._longest = 0
        self._numbers = itertools.count()
        self._clock = 0.0
        self._chosen: T | None = None

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, item: object) -> bool:
        return item in self._items

    def __iter__(self) -> Iterator[T]:
        return iter(self._items)

    def push(self, tenant: str, item: T, cost: float, *, needs: str = "", key: float = 0.0) -> None:
        """Puts an item into its tenant's line: before those with a higher `key`, behind those with the same."""
        number = next(self._numbers)
        self._items[item] = _Item(tenant, cost, needs, number)
        line = self._lines.get(tenant)
        if line is None:
            line = self._lines[tenant] = _Line(number)
            self._tags[tenant] = max(self._clock, self._tags.get(tenant, 0.0))
        if self._knows_longest:
            self._measure(tenant, len(line.items), 1)
        line.items[item] = None
        heap = line.by_class.get(needs)
        if heap is None:
            heap = line.by_class[needs] = _Heap()
        heap.push(key, number, item)
        self._rank(needs, tenant, line)

    def push_front(self, tenant: str, item: T, *, needs: str = "", key: float = 0.0) -> None:
        """Puts back an item that was taken before, by `key` among the others that were; it is not charged again."""
        self.remove(item)
        number = next(self._numbers)
        self._items[item] = _Item(tenant, 0.0, needs, number)
        self._put_back.add(item)
        heap = self._front.get(needs)
        if heap is None:
            heap = self._front[needs] = _Heap()
        heap.push(key, number, item)

    def remove(self, item: T) -> None:
        """Takes an item out without serving it; nothing happens if it is not here."""
        known = self._items.pop(item, None)
        if known is None:
            return
        if self._chosen == item:
            self._chosen = None
        if item in self._put_back:
            self._put_back.discard(item)
            self._front[known.needs].left(self._items)
            return
        line = self._lines[known.tenant]
        if self._knows_longest:
            self._measure(known.tenant, len(line.items), -1)
        del line.items[item]
        heap = line.by_class[known.needs]
        heap.left(self._items)
        if not heap.num_items:
            del line.by_class[known.needs]
        if not line.items:
            self._tidy(known.tenant)

    def next(self, blocked: Collection[str] = ()) -> T | None:
        """The item whose turn it is among those whose class is not `blocked`, left in place."""
        if self._put_back:
            found = [
                entry
                for needs, heap in self._front.items()
                if needs not in blocked and (entry := heap.first(self._items)) is not None
            ]
            if found:
                return min(found)[2]
        if self._chosen is not None and self._items[self._chosen].needs not in blocked:
            return self._chosen
        tenant = self._next_tenant(blocked)
        if tenant is None:
            self._chosen = None
            return None
        head: tuple[float, int, T] | None = None
        for needs, heap in self._lines[tenant].by_class.items():
            if needs not in blocked and (first := heap.first(self._items)) is not None and (not head or first < head):
                head = first
        assert head is not None, f"{tenant} is ranked and has nothing"
        self._chosen = head[2]
        return self._chosen

    def take(self, item: T) -> None:
        """Serves an item that `next` gave: its tenant is charged for it."""
        if item in self._put_back:
            self.remove(item)
            return
        tenant, cost, _, _ = self._items[item]
        # The clock moves by an equal share of the cost, since all waiting tenants are entitled to as much.
        self._clock = max(self._clock, self._tags[tenant]) + cost / len(self._lines)
        self._tags[tenant] += cost
        self.remove(item)
        if (line := self._lines.get(tenant)) is not None:
            for needs in line.by_class:
                self._rank(needs, tenant, line)

    def waiting(self, needs: str) -> list[T]:
        """All items of a class."""
        return [item for item, known in self._items.items() if known.needs == needs]

    def count(self, tenant: str) -> int:
        """How many items of a tenant are waiting that have not been taken before."""
        line = self._lines.get(tenant)
        return len(line.items) if line else 0

    def newest_of_longest(self) -> tuple[str, T] | None:
        """The tenant with the longest line, and the last item that joined it; None if all lines are empty."""
        if not self._longest:
            return None
        tenant = next(iter(self._by_length[self._longest]))
        return tenant, next(reversed(self._lines[tenant].items))

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _rank(self, needs: str, tenant: str, line: _Line[T]) -> None:
        """Ranks a tenant that has items of a class, by its current tag; its earlier entries are now out of date."""
        tag = self._tags[tenant]
        if line.ranked.get(needs) != tag:
            line.ranked[needs] = tag
            heapq.heappush(self._ranks.setdefault(needs, []), (tag, line.number, tenant))

    def _next_tenant(self, blocked: Collection[str]) -> str | None:
        best: tuple[float, int, str] | None = None
        for needs, ranks in self._ranks.items():
            if needs in blocked:
                continue
            while ranks and not self._is_ranked(needs, *ranks[0]):
                heapq.heappop(ranks)
            if ranks and (best is None or ranks[0] < best):
                best = ranks[0]
        return best[2] if best else None

    def _is_ranked(self, needs: str, tag: float, number: int, tenant: str) -> bool:
        """Whether an entry is still right: the tenant waits with this tag and has items of the class."""
        line = self._lines.get(tenant)
        if line is None or line.number != number or self._tags[tenant] != tag:
            return False
        if needs in line.by_class:
            return True
        line.ranked.pop(needs, None)
        return False

    def _measure(self, tenant: str, length: int, change: int) -> None:
        """A tenant's line has become longer or shorter by one; keeps tenants by length, so that nobody has to scan."""
        if length:
            before = self._by_length[length]
            del before[tenant]
            if not before:
                del self._by_length[length]
        if length + change:
            self._by_length.setdefault(length + change, {})[tenant] = None
        if change > 0:
            self._longest = max(self._longest, length + 1)
        elif self._longest not in self._by_length:
            self._longest -= 1

    def _tidy(self, tenant: str) -> None:
        """Forgets an empty line, and tags that the clock has passed: their tenants would start at the clock anyway."""
        del self._lines[tenant]
        if len(self._tags) > 2 * len(self._lines) + _MIN_STALE:
            self._tags = {one: tag for one, tag in self._tags.items() if one in self._lines or tag > self._clock}

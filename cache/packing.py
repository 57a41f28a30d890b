"""Whether patches all fit into several pools, and which goes where.

Lives in the broker's decision core; pure. A pool is only a number of bytes here: extents in an empty pool, taken one
after the other, leave no holes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

# Steps of the search before it gives up: about 10 ms. Patches of one model have few sizes, so few steps are needed.
MAX_STEPS = 10_000


def pack(sizes: Mapping[str, int], rooms: Mapping[str, int]) -> dict[str, str] | None:
    """Which pool each patch goes to, such that no pool gets more than it has room for.

    The search is over how many patches of each size a pool gets, the largest first and as many as fit. It finds a way
    if there is one, unless it needs more than `MAX_STEPS`.

    Args:
        sizes: bytes by patch.
        rooms: bytes by pool.

    Returns:
        The pool of each patch, or None.
    """
    if sum(sizes.values()) > sum(rooms.values()):
        return None
    kinds = sorted(Counter(sizes.values()).items(), reverse=True)
    pools = sorted(rooms, key=lambda pool: rooms[pool])
    search = _Search([size for size, _ in kinds], [rooms[pool] for pool in pools])
    shares = search.shares(tuple(count for _, count in kinds), 0)
    if shares is None:
        return None
    found: dict[str, str] = {}
    for place, (size, _) in enumerate(kinds):
        takers = (pool for pool, share in zip(pools, shares, strict=True) for _ in range(share[place]))
        found |= dict(zip((key for key, nbytes in sizes.items() if nbytes == size), takers, strict=True))
    return found


_Counts = tuple[int, ...]  # how many of each size


class _Search:
    """One search: `sizes` from the largest, `rooms` of the pools."""

    def __init__(self, sizes: list[int], rooms: list[int]) -> None:
        self._sizes, self._rooms = sizes, rooms
        self._hopeless: set[tuple[_Counts, int]] = set()
        self._num_steps = 0

    def shares(self, counts: _Counts, at: int) -> list[_Counts] | None:
        """How much of `counts` each pool from `at` on gets, or None."""
        if not any(counts):
            return [counts] * (len(self._rooms) - at)
        if at == len(self._rooms) or (counts, at) in self._hopeless:
            return None
        for share in self._fills(counts, self._rooms[at], 0):
            left = tuple(count - taken for count, taken in zip(counts, share, strict=True))
            if (others := self.shares(left, at + 1)) is not None:
                return [share, *others]
        self._hopeless.add((counts, at))  # or the search was given up
        return None

    def _fills(self, counts: _Counts, room: int, at: int) -> Iterator[_Counts]:
        """The ways to fill `room` with patches from the size `at` on such that no other one fits in."""
        self._num_steps += 1
        if self._num_steps > MAX_STEPS:
            return
        if at == len(counts):
            yield ()
            return
        size = self._sizes[at]
        for taken in range(min(counts[at], room // size), -1, -1):
            for rest in self._fills(counts, room - taken * size, at + 1):
                left = room - taken * size - sum(n * s for n, s in zip(rest, self._sizes[at + 1 :], strict=True))
                if taken == counts[at] or left < size:
                    yield (taken, *rest)

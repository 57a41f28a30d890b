"""The memory of all pools together: where a patch goes, and what must leave for it.

Lives in the broker's decision core; pure. Owns the extents of each pool and the order of eviction; who pins what and
which generation is where is the index's business (`cache.index`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from cache.eviction import Clock, EvictionQueue, Rank
from cache.extents import Extents, align
from cache.packing import pack
from epd.messages import Pool


class Extent(NamedTuple):
    """Bytes of a pool."""

    pool_id: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Where each key has its memory now, and which keys had to leave."""

    extents: dict[str, Extent]
    evicted: list[str]


@dataclass(slots=True)
class _Memory:
    pool: Pool
    extents: Extents
    evictable: EvictionQueue = field(default_factory=EvictionQueue)


_Victim = tuple[str, Extent, Rank]


class Arena:
    """Allocates extents in all pools; evicts in the order of `cache.eviction` what may be evicted.

    Attributes:
        capacity_bytes: usable bytes of all pools.
        used_bytes: allocated bytes of all pools, including those that may be evicted.
    """

    def __init__(self, pools: Iterable[Pool] = ()) -> None:
        self._memories: dict[str, _Memory] = {}
        self._evictable: dict[str, Extent] = {}
        self._evictable_bytes = 0
        self._min_slot_bytes = self._largest_bytes = 0
        self.capacity_bytes = self.used_bytes = 0
        self._clock = Clock()
        for pool in pools:
            self.add(pool)

    @property
    def pools(self) -> list[Pool]:
        """All pools, in the order they were added."""
        return [memory.pool for memory in self._memories.values()]

    @property
    def free_bytes(self) -> int:
        """Unallocated bytes of all pools."""
        return self.capacity_bytes - self.used_bytes

    def add(self, pool: Pool) -> None:
        """Adds a pool, all of it free.

        Raises:
            ValueError: another pool has its `pool_id`.
        """
        if pool.pool_id in self._memories:
            raise ValueError(f"pool {pool.pool_id} exists already")
        self._memories[pool.pool_id] = _Memory(pool, Extents(pool.nbytes))
        self._measure()

    def remove(self, pool_id: str) -> None:
        """Forgets a pool and all extents in it.

        Raises:
            KeyError: there is no such pool.
        """
        del self._memories[pool_id]
        for key in [key for key, extent in self._evictable.items() if extent.pool_id == pool_id]:
            self._evictable_bytes -= self._evictable.pop(key).nbytes
        self._measure()

    def _measure(self) -> None:
        """Pools have come or gone."""
        memories = self._memories.values()
        self.capacity_bytes = sum(memory.extents.capacity_bytes for memory in memories)
        self.used_bytes = sum(memory.extents.used_bytes for memory in memories)
        self._largest_bytes = max((memory.extents.capacity_bytes for memory in memories), default=0)
        # A patch may go to any pool, so it counts with the size that it has in each of them.
        self._min_slot_bytes = max((memory.pool.min_slot_bytes for memory in memories), default=0)

    def allow_eviction(self, key: str, extent: Extent, cost_s: float) -> None:
        """From now on `key` may leave `extent` when room is needed; `cost_s` is how long encoding it again takes."""
        self._put(key, extent, self._clock.rank(cost_s / extent.nbytes))

    def forbid_eviction(self, key: str) -> None:
        """From now on `key` stays; nothing happens if it could not be evicted anyway."""
        if key in self._evictable:
            self._pull(key)

    def free(self, extent: Extent) -> None:
        """Frees an extent that is not evictable."""
        self._memories[extent.pool_id].extents.free(extent.offset)
        self.used_bytes -= extent.nbytes

    def place(
        self, sizes: Mapping[str, int], *, keep: Collection[str] = (), prefer: str | None = None
    ) -> Placement | None:
        """Allocates `sizes` (key -> bytes), all or nothing; evicts as little as it can, and never `keep`.

        The pool named by `prefer` is used as long as anything can be evicted there. Otherwise it is the pool with the
        most free bytes; if none has room, the lowest rank of all pools leaves.

        Returns:
            None, with nothing changed, if they do not fit at present.
        """
        sizes = self._slots(sizes)
        if sum(sizes.values()) > self.free_bytes + self._evictable_bytes:
            return None
        kept = [(key, *self._pull(key)) for key in keep if key in self._evictable]
        victims: list[_Victim] = []
        placed: dict[str, Extent] = {}
        for key, nbytes in sorted(sizes.items(), key=lambda item: -item[1]):
            extent = self._find(nbytes, prefer, victims)
            if extent is None:
                break
            placed[key] = extent
        else:
            self._spare(victims, placed.values())
        for item in kept:
            self._put(*item)
        if len(placed) < len(sizes):
            self._undo(placed.values(), victims)
            return None
        return Placement(placed, [key for key, _, _ in victims])

    def place_anew(self, sizes: Mapping[str, int]) -> Placement | None:
        """Places `sizes` as in empty pools, whatever has to leave; some of `sizes` may themselves be evictable now.

        For pools that hold only what may be evicted: then it returns None only if `fits_empty` is false.
        """
        plan = None if self.used_bytes > self._evictable_bytes else self._plan_empty(sizes)
        if plan is None:
            return None
        victims = []
        for key in list(self._evictable):
            extent, rank = self._pull(key)
            self.free(extent)
            victims.append((key, extent, rank))
        victims.sort(key=lambda victim: victim[2])
        for extent in plan.values():
            taken = self._retake(extent)
            assert taken, f"{extent} is not free in empty pools"
        moved = [victim for victim in victims if victim[0] in sizes]
        left = [victim for victim in victims if victim[0] not in sizes]
        self._spare(left, ())
        return Placement(plan, [key for key, _, _ in moved + left])

    def fits_empty(self, sizes: Mapping[str, int]) -> bool:
        """Whether `sizes` all fit into these pools when they are empty."""
        if sum(map(align, self._slots(sizes).values())) <= self._largest_bytes:
            return True  # one after the other, in that pool alone
        return self._plan_empty(sizes) is not None

    def _plan_empty(self, sizes: Mapping[str, int]) -> dict[str, Extent] | None:
        """Where `sizes` go in these pools when they are empty: as `place` would do it, else by any packing."""
        if placement := Arena(self.pools).place(sizes):
            return placement.extents
        sizes = self._slots(sizes)
        rooms = {pool_id: memory.extents.capacity_bytes for pool_id, memory in self._memories.items()}
        packing = pack({key: align(nbytes) for key, nbytes in sizes.items()}, rooms)
        if packing is None:
            return None
        empty = Arena(self.pools)
        extents = {key: empty._allocate(empty._memories[pool_id], sizes[key]) for key, pool_id in packing.items()}
        assert all(extents.values()), "a packing does not fit"
        return {key: extent for key, extent in extents.items() if extent is not None}

    def _slots(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The bytes of pool that `sizes` take."""
        least = self._min_slot_bytes
        return {key: max(nbytes, least) for key, nbytes in sizes.items()} if least else dict(sizes)

    def _find(self, nbytes: int, prefer: str | None, victims: list[_Victim]) -> Extent | None:
        preferred = self._memories.get(prefer) if prefer is not None else None
        if preferred is not None and (extent := self._find_in([preferred], nbytes, victims)):
            return extent
        everywhere = list(self._memories.values())
        if len(everywhere) > 1:
            everywhere.sort(key=lambda memory: -memory.extents.free_bytes)
        return self._find_in(everywhere, nbytes, victims)

    def _find_in(self, memories: list[_Memory], nbytes: int, victims: list[_Victim]) -> Extent | None:
        memories = [memory for memory in memories if memory.extents.capacity_bytes >= nbytes]
        need = align(nbytes)
        for memory in memories:
            if extent := self._allocate(memory, nbytes):
                return extent
        while (lowest := _lowest(memories)) is not None:
            memory, key = lowest
            victim, rank = self._pull(key)
            victims.append((key, victim, rank))
            if victim.nbytes == need:  # the usual case: patches have few sizes, and one takes the place of another
                return victim
            self.free(victim)
            if extent := self._allocate(memory, nbytes):
                return extent
        return None

    def _allocate(self, memory: _Memory, nbytes: int) -> Extent | None:
        offset = memory.extents.allocate(nbytes)
        if offset is None:
            return None
        extent = Extent(memory.pool.pool_id, offset, align(nbytes))
        self.used_bytes += extent.nbytes
        return extent

    def _retake(self, extent: Extent) -> bool:
        """Takes back what was freed; False if it is in use by now."""
        if not self._memories[extent.pool_id].extents.take(extent.offset, extent.nbytes):
            return False
        self.used_bytes += extent.nbytes
        return True

    def _spare(self, victims: list[_Victim], placed: Iterable[Extent]) -> None:
        """Takes back the `victims` whose memory was not needed after all, the most valuable first.

        `placed` has what was needed exactly as it was.
        """
        needed = set(placed)
        for victim in reversed(list(victims)):
            key, extent, rank = victim
            if extent not in needed and self._retake(extent):
                self._put(key, extent, rank)
                victims.remove(victim)
            else:
                self._clock.advance(rank)

    def _undo(self, placed: Iterable[Extent], victims: list[_Victim]) -> None:
        for extent in placed:
            self.free(extent)
        for key, extent, rank in victims:
            taken = self._retake(extent)
            assert taken, f"{extent} was in use before and is not free"
            self._put(key, extent, rank)

    def _put(self, key: str, extent: Extent, rank: Rank) -> None:
        self._evictable[key] = extent
        self._evictable_bytes += extent.nbytes
        self._memories[extent.pool_id].evictable.put(key, rank)

    def _pull(self, key: str) -> tuple[Extent, Rank]:
        extent = self._evictable.pop(key)
        self._evictable_bytes -= extent.nbytes
        rank = self._memories[extent.pool_id].evictable.remove(key)
        assert rank is not None, f"{key} has no rank"
        return extent, rank


def _lowest(memories: list[_Memory]) -> tuple[_Memory, str] | None:
    if len(memories) == 1:
        first = memories[0].evictable.lowest()
        return (memories[0], first[1]) if first else None
    found = [(lowest, memory) for memory in memories if (lowest := memory.evictable.lowest())]
    if not found:
        return None
    (_, key), memory = min(found, key=lambda item: item[0])
    return memory, key

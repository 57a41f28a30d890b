"""The index of the shared multimodal cache: which patch is in which slot, who needs it, and what may leave.

Lives in the broker's decision core, which is its only caller; pure: no clock, no I/O. Owns all entries, their pins and
generations, and through `cache.arena` the memory of all pools.

An entry is named by the hash of its patch's content (pixels, model, processor settings, tenant salt):

    absent --acquire_all--> ALLOCATED --commit--> READY --evicted--> absent
    ALLOCATED, READY, LOST --renew--> ALLOCATED    a new generation: what was there is not trusted
    ALLOCATED, READY --drop, pool removed, renew without room--> LOST while it is pinned, then absent

Every allocation and every renewal has its own generation; whoever names an earlier one (an encode worker that is too
late) is refused. A holder is whoever pins entries; the index only tells them apart.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Sequence

from cache.arena import Arena, Extent, Placement
from cache.entries import Acquired, Entry, FencedError, IndexStats, Outcome, PatchNeed, ShapeError, State
from epd.messages import Pool, Slot

__all__ = ["Acquired", "CacheIndex", "FencedError", "IndexStats", "Outcome", "PatchNeed", "ShapeError", "State"]


class CacheIndex:
    """The index; it starts without pools.

    Args:
        first_generation: the first generation to use. Pools outlive the broker, so each of its runs must start above
            all earlier ones, as a clock does.
    """

    def __init__(self, first_generation: int = 1) -> None:
        self._generations = itertools.count(first_generation)
        self._arena = Arena()
        self._entries: dict[str, Entry] = {}
        self._pins: dict[Hashable, dict[str, None]] = {}  # holder -> hashes
        self._quarantined: dict[int, Extent] = {}  # by the generation that may still be written there
        self._num_by_state: Counter[State] = Counter()
        self._num_pins = self._num_embeddings = self._pinned_bytes = self._quarantined_bytes = 0
        self._num_hits = self._num_coalesced = self._num_new = self._num_evictions = 0

    @property
    def pools(self) -> list[Pool]:
        """All pools, in the order they were added."""
        return self._arena.pools

    def add_pool(self, pool: Pool) -> None:
        """Adds an empty pool.

        Raises:
            ValueError: there is a pool with that id already.
        """
        self._arena.add(pool)

    def remove_pool(self, pool_id: str) -> list[str]:
        """Forgets a pool and everything in it.

        Returns:
            The hashes of the patches that were there. Pinned ones are LOST now: `renew` gives them another slot, or
            their holders fail. The others are absent.

        Raises:
            KeyError: there is no such pool.
        """
        self._arena.remove(pool_id)
        self._quarantined = {g: extent for g, extent in self._quarantined.items() if extent.pool_id != pool_id}
        self._quarantined_bytes = sum(extent.nbytes for extent in self._quarantined.values())
        gone = self.in_pool(pool_id)
        for patch_hash in gone:
            self._move(self._entries[patch_hash], None)
            self._lose(patch_hash)
        return gone

    def in_pool(self, pool_id: str) -> list[str]:
        """The hashes of the patches that have a slot in a pool."""
        return [h for h, entry in self._entries.items() if entry.extent and entry.extent.pool_id == pool_id]

    def acquire_all(
        self, needs: Sequence[PatchNeed], holder: Hashable, *, prefer_pool: str | None = None
    ) -> list[Acquired] | None:
        """Pins all of `needs` for `holder`, allocating what is absent; all or nothing.

        What has to leave for them is unpinned and READY, and none of `needs`, with one exception: if nothing else is in
        the pools and ready patches of `needs` are in the way, these are encoded again too, as waiting would not help.
        So if `could_ever_fit` holds, an otherwise unused cache always gives a result.

        Args:
            needs: the patches; a hash that comes twice is acquired once.
            holder: who pins them until `release`.
            prefer_pool: use this pool as long as anything in it can be evicted.

        Returns:
            Each patch once, in the order of `needs`; or None, with nothing changed, if they do not fit at present.

        Raises:
            ShapeError: a hash is known with another shape, or comes twice with different ones.
            ValueError: a need has an unknown dtype or an impossible shape.
        """
        wanted = self._distinct(needs)
        kept = {h for h in wanted if (entry := self._entries.get(h)) and entry.state is not State.LOST}
        missing = {h: need.nbytes for h, need in wanted.items() if h not in kept}
        placement = self._arena.place(missing, keep=kept, prefer=prefer_pool)
        placement = placement or self._arena.place_anew({h: need.nbytes for h, need in wanted.items()})
        if placement is None:
            return None
        self._forget_evicted(placement)
        return [self._pin(need, holder, placement.extents.get(h)) for h, need in wanted.items()]

    def share(self, holder: Hashable, other: Hashable) -> None:
        """Pins for `holder` what `other` pins, except LOST patches; for the next leg of a request."""
        for patch_hash in self._pins.get(other, ()):
            entry = self._entries[patch_hash]
            if entry.state is not State.LOST:
                self._add_pin(entry, patch_hash, holder)

    def holds(self, holder: Hashable) -> bool:
        """Whether `holder` pins anything."""
        return holder in self._pins

    def could_ever_fit(self, needs: Sequence[PatchNeed]) -> bool:
        """Whether `needs` fit together into the pools there are when nothing else is in them.

        With several pools that many different sizes would nearly fill, the puzzle may be too hard (`cache.packing`);
        then this is False.

        Raises:
            ShapeError, ValueError: as for `acquire_all`.
        """
        return self._arena.fits_empty({h: need.nbytes for h, need in self._distinct(needs).items()})

    def commit(self, patch_hash: str, generation: int, owner: str = "") -> bool:
        """Notes that `owner` has written a patch: ALLOCATED becomes READY; False if another generation is expected."""
        entry = self._entries.get(patch_hash)
        if entry is None or entry.generation != generation or entry.state is not State.ALLOCATED:
            return False
        self._leave_state(entry)
        entry.written(owner)
        self._enter_state(entry)
        self._allow_eviction_if_unpinned(entry)
        return True

    def is_current(self, patch_hash: str, generation: int) -> bool:
        """Whether `generation` is the patch's current one; if not, whoever names it is too late."""
        entry = self._entries.get(patch_hash)
        return entry is not None and entry.generation == generation

    def renew(self, patch_hash: str, generation: int, *, quarantine: bool = False) -> Slot | None:
        """Distrusts the slot of `generation`: the patch is ALLOCATED again with a new generation; its pins are kept.

        For a stale slot; with `quarantine`, for an encode worker that was lost and might still write: then the patch
        gets other memory, and the old memory is out of use until `lift_quarantine(generation)`. A LOST patch gets new
        memory.

        Returns:
            The slot to encode into, or None if there is no other room. Then the patch is LOST (absent if nobody pins
            it): its holders should fail, or `renew` be tried again with the same generation.

        Raises:
            FencedError: `generation` is not the current one (see `is_current`).
        """
        if not self.is_current(patch_hash, generation):
            raise FencedError(f"patch {patch_hash} is not at generation {generation}")
        entry = self._entries[patch_hash]
        self._arena.forbid_eviction(patch_hash)
        if quarantine or entry.extent is None:
            placement = self._arena.place({patch_hash: entry.need.nbytes})
            if placement is None:
                self._retire(entry, quarantine)
                self._lose(patch_hash)
                return None
            self._forget_evicted(placement)
            self._retire(entry, quarantine)
            self._move(entry, placement.extents[patch_hash])
        entry.move(entry.extent, next(self._generations))
        self._leave_state(entry)
        entry.state = State.ALLOCATED
        self._enter_state(entry)
        return entry.slot

    def drop(self, patch_hash: str, generation: int, *, quarantine: bool = False) -> bool:
        """Gives up a patch and frees its memory (with `quarantine`: at `lift_quarantine`).

        For an encode that failed or was cancelled, and for a stale slot whose patch cannot be encoded again. While it
        is pinned it is LOST: its holders should fail, and whoever acquires it next gets new memory.

        Returns:
            False, with nothing changed, if `generation` is not the current one.
        """
        if not self.is_current(patch_hash, generation):
            return False
        self._arena.forbid_eviction(patch_hash)
        self._retire(self._entries[patch_hash], quarantine)
        self._lose(patch_hash)
        return True

    def lift_quarantine(self, generation: int) -> bool:
        """Frees the memory of `generation`: nobody can write to it any more. False if none was set aside."""
        if (extent := self._quarantined.pop(generation, None)) is None:
            return False
        self._quarantined_bytes -= extent.nbytes
        self._arena.free(extent)
        return True

    def release(self, holder: Hashable) -> list[str]:
        """Unpins all that `holder` pins; nothing happens if it pins nothing.

        READY patches that nobody else pins are kept for reuse until they are evicted.

        Returns:
            The hashes that are ALLOCATED but not needed now: the caller commits or drops them.
        """
        unneeded = []
        pins = self._pins.pop(holder, {})
        self._num_pins -= len(pins)
        for patch_hash in pins:
            entry = self._entries[patch_hash]
            del entry.holders[holder]
            if entry.holders:
                continue
            if entry.extent is not None:
                self._pinned_bytes -= entry.extent.nbytes
            if entry.state is State.LOST:
                self._forget(patch_hash)
            elif entry.state is State.ALLOCATED:
                unneeded.append(patch_hash)
            else:
                self._allow_eviction_if_unpinned(entry)
        return unneeded

    def holders(self, patch_hash: str) -> tuple[Hashable, ...]:
        """Who pins a patch, in order of arrival."""
        entry = self._entries.get(patch_hash)
        return tuple(entry.holders) if entry else ()

    def slot(self, patch_hash: str) -> Slot | None:
        """A patch's current slot; None if it is absent or LOST."""
        entry = self._entries.get(patch_hash)
        return entry.slot if entry else None

    def readable(self, patch_hash: str) -> Slot | None:
        """A patch's slot if it is READY, else None."""
        entry = self._entries.get(patch_hash)
        return entry.slot if entry and entry.state is State.READY else None

    def state(self, patch_hash: str) -> State | None:
        """A patch's state; None if it is absent."""
        entry = self._entries.get(patch_hash)
        return entry.state if entry else None

    def occupied(self, pool_id: str) -> list[tuple[int, int, str]]:
        """What is where in a pool: offset, bytes and "pinned", "ready", "allocated" or "quarantined"."""
        found = [
            (extent.offset, extent.nbytes, "quarantined")
            for extent in self._quarantined.values()
            if extent.pool_id == pool_id
        ]
        for entry in self._entries.values():
            if entry.extent and entry.extent.pool_id == pool_id:
                pinned = entry.state is State.READY and entry.holders
                found.append((entry.extent.offset, entry.extent.nbytes, "pinned" if pinned else str(entry.state)))
        return sorted(found)

    def stats(self) -> IndexStats:
        """The index in numbers."""
        return IndexStats(
            total_bytes=self._arena.capacity_bytes,
            used_bytes=self._arena.used_bytes,
            pinned_bytes=self._pinned_bytes,
            quarantined_bytes=self._quarantined_bytes,
            num_allocated=self._num_by_state[State.ALLOCATED],
            num_ready=self._num_by_state[State.READY],
            num_lost=self._num_by_state[State.LOST],
            num_pins=self._num_pins,
            num_embeddings=self._num_embeddings,
            num_hits=self._num_hits,
            num_coalesced=self._num_coalesced,
            num_new=self._num_new,
            num_evictions=self._num_evictions,
        )

    @property
    def capacity_bytes(self) -> int:
        """Usable bytes of all pools."""
        return self._arena.capacity_bytes

    def _distinct(self, needs: Sequence[PatchNeed]) -> dict[str, PatchNeed]:
        wanted: dict[str, PatchNeed] = {}
        for need in needs:
            entry = self._entries.get(need.patch_hash)
            known = entry.need if entry else wanted.get(need.patch_hash)
            if known and known.shape != need.shape:
                raise ShapeError(f"patch {need.patch_hash} is {known.shape}, but asked for as {need.shape}")
            wanted.setdefault(need.patch_hash, need)
        return wanted

    def _pin(self, need: PatchNeed, holder: Hashable, extent: Extent | None) -> Acquired:
        """Pins a patch, in `extent` if it is new."""
        patch_hash = need.patch_hash
        if extent:
            self._num_new += 1
            outcome = Outcome.NEW
            entry = self._entries.get(patch_hash)
            if entry is None:
                entry = self._entries[patch_hash] = Entry(need, extent, next(self._generations))
            else:  # it is LOST, but somebody still pins it
                self._leave_state(entry)
                self._move(entry, extent)
                entry.move(extent, next(self._generations))
                entry.need, entry.state = need, State.ALLOCATED
            self._enter_state(entry)
        else:
            entry = self._entries[patch_hash]
            entry.need = need  # the cost of encoding it may be known better by now
            outcome = Outcome.HIT if entry.state is State.READY else Outcome.PENDING
            self._num_hits += outcome is Outcome.HIT
            self._num_coalesced += outcome is Outcome.PENDING
            self._arena.forbid_eviction(patch_hash)
        self._add_pin(entry, patch_hash, holder)
        slot = entry.slot
        assert slot is not None, f"{patch_hash} is pinned without memory"
        return Acquired(patch_hash, outcome, slot)

    def _add_pin(self, entry: Entry, patch_hash: str, holder: Hashable) -> None:
        pins = self._pins.get(holder)
        if pins is None:
            pins = self._pins[holder] = {}
        if patch_hash in pins:
            return
        pins[patch_hash] = None
        self._num_pins += 1
        if not entry.holders and entry.extent is not None:
            self._pinned_bytes += entry.extent.nbytes
        entry.holders[holder] = None

    def _forget_evicted(self, placement: Placement) -> None:
        self._num_evictions += len(placement.evicted)
        for patch_hash in placement.evicted:
            self._forget(patch_hash)

    def _forget(self, patch_hash: str) -> None:
        self._leave_state(self._entries.pop(patch_hash))

    def _enter_state(self, entry: Entry) -> None:
        self._num_by_state[entry.state] += 1
        if entry.state is State.READY:
            self._num_embeddings += entry.need.num_tokens

    def _leave_state(self, entry: Entry) -> None:
        self._num_by_state[entry.state] -= 1
        if entry.state is State.READY:
            self._num_embeddings -= entry.need.num_tokens

    def _move(self, entry: Entry, extent: Extent | None) -> None:
        """Gives an entry other memory or none."""
        if entry.holders:
            self._pinned_bytes += (extent.nbytes if extent else 0) - (entry.extent.nbytes if entry.extent else 0)
        entry.move(extent, entry.generation)

    def _allow_eviction_if_unpinned(self, entry: Entry) -> None:
        if entry.extent and entry.state is State.READY and not entry.holders:
            self._arena.allow_eviction(entry.need.patch_hash, entry.extent, entry.need.encode_cost_s)

    def _retire(self, entry: Entry, quarantine: bool) -> None:
        """Frees an entry's memory, or quarantines it under its generation."""
        if entry.extent and quarantine:
            self._quarantined[entry.generation] = entry.extent
            self._quarantined_bytes += entry.extent.nbytes
        elif entry.extent:
            self._arena.free(entry.extent)
        self._move(entry, None)

    def _lose(self, patch_hash: str) -> None:
        """Marks an entry that no longer has memory."""
        entry = self._entries[patch_hash]
        self._leave_state(entry)
        entry.state = State.LOST
        self._enter_state(entry)
        if not entry.holders:
            self._forget(patch_hash)

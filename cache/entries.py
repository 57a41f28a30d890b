"""What the index knows of patches: entries and their states, its questions and answers. Pure.

Lives in the broker's decision core, behind `cache.index`.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from cache.arena import Extent
from cache.slot import slot_bytes
from epd.messages import Slot


class State(enum.StrEnum):
    """Where an entry is in its life."""

    ALLOCATED = "allocated"  # an encode worker is to write it
    READY = "ready"  # it can be read
    LOST = "lost"  # it no longer has memory, but is still pinned


class Outcome(enum.StrEnum):
    """What acquiring a patch found."""

    HIT = "hit"  # ready: read it
    PENDING = "pending"  # being encoded for someone else: wait for it
    NEW = "new"  # allocated now: have it encoded


class FencedError(LookupError):
    """The generation is not the entry's current one: somebody is too late."""


class ShapeError(ValueError):
    """A patch is asked for with a shape other than the one known under its hash."""


_slot_bytes = lru_cache(maxsize=4096)(slot_bytes)  # patches have few shapes


class PatchNeed(NamedTuple):
    """A patch that a request needs: `num_tokens` x `width` elements of `dtype`.

    `encode_cost_s` is how long encoding it takes, in seconds; it decides what is kept longer. At equal costs per byte
    the least recently used leaves first.
    """

    patch_hash: str
    num_tokens: int
    width: int
    dtype: str
    encode_cost_s: float = 0.0

    @property
    def shape(self) -> tuple[int, int, str]:
        """What must be equal wherever the hash is the same."""
        return self.num_tokens, self.width, self.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its slot."""
        return _slot_bytes(self.num_tokens, self.width, self.dtype)


class Acquired(NamedTuple):
    """A patch pinned by `acquire_all`, and its slot."""

    patch_hash: str
    outcome: Outcome
    slot: Slot


@dataclass(frozen=True, slots=True)
class IndexStats:
    """The index in numbers: gauges, except the last four, which count from the start.

    `used_bytes` includes everything that is allocated: pinned, quarantined and evictable. `num_embeddings` are the rows
    that can be read.
    """

    total_bytes: int
    used_bytes: int
    pinned_bytes: int
    quarantined_bytes: int
    num_allocated: int
    num_ready: int
    num_lost: int
    num_pins: int
    num_embeddings: int
    num_hits: int
    num_coalesced: int
    num_new: int
    num_evictions: int


@dataclass(slots=True)
class Entry:
    """A patch that has been asked for: where it is, its state, and who pins it, in order of arrival."""

    need: PatchNeed
    extent: Extent | None
    generation: int
    state: State = State.ALLOCATED
    owner: str = ""
    holders: dict[Hashable, None] = field(default_factory=dict)
    _slot: Slot | None = None

    @property
    def slot(self) -> Slot | None:
        """Its slot; None if it has no memory."""
        if self._slot is None and self.extent is not None:
            where, need = self.extent, self.need
            self._slot = Slot(
                pool_id=where.pool_id, offset=where.offset, nbytes=where.nbytes, generation=self.generation,
                num_tokens=need.num_tokens, width=need.width, dtype=need.dtype, owner=self.owner,
            )  # fmt: skip
        return self._slot

    def move(self, extent: Extent | None, generation: int) -> None:
        """Gives it other memory, or none; or its memory has new contents."""
        self.extent, self.generation, self.owner, self._slot = extent, generation, "", None

    def written(self, owner: str) -> None:
        """Notes that `owner` has written it."""
        self.state, self.owner, self._slot = State.READY, owner, None

"""Pools by kind: memory that holds embeddings, its owners and its views.

Lives in the cache daemon and in the workers; owns nothing itself. Kinds are imported when they are used, so that those
which need an engine cost the others nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from cache.pools.base import PoolError, PoolKindError, PoolOwner, PoolView
from cache.pools.shared_memory import KIND as SHARED_MEMORY
from cache.pools.shared_memory import SharedMemoryPool, SharedMemoryView
from epd.messages import Pool

__all__ = ["KINDS", "SHARED_MEMORY", "PoolError", "PoolKindError", "PoolOwner", "PoolView", "create", "open_view"]

_OWNERS: dict[str, Callable[[str, int, bool], PoolOwner]] = {SHARED_MEMORY: SharedMemoryPool}
_VIEWS: dict[str, Callable[[Pool], PoolView]] = {SHARED_MEMORY: SharedMemoryView}

KINDS = tuple(_OWNERS)


def create(kind: str, pool_id: str, nbytes: int, checksum: bool) -> PoolOwner:
    """Makes a pool of `nbytes` bytes that this process owns.

    Raises:
        PoolKindError: there is no such kind here.
        PoolError: it cannot be made.
    """
    if kind not in _OWNERS:
        raise _unknown(kind)
    return _OWNERS[kind](pool_id, nbytes, checksum)


def open_view(pool: Pool) -> PoolView:
    """Opens a pool that another process (or this one) owns.

    Raises:
        PoolKindError: there is no such kind here.
        PoolError: it cannot be opened.
    """
    if pool.kind not in _VIEWS:
        raise _unknown(pool.kind)
    return _VIEWS[pool.kind](pool)


def _unknown(kind: str) -> PoolKindError:
    return PoolKindError(f"pools of kind {kind!r} are not available here; there are: {', '.join(KINDS)}")

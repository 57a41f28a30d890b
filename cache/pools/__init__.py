"""Pools by kind: memory that holds embeddings, its owners and its views.

Lives in the cache daemon and in the workers; owns nothing itself. Kinds are imported when they are used, so that kinds
that need an engine cost the others nothing.
"""

from __future__ import annotations

from collections.abc import Callable

from cache.pools.base import DevicePoolView, PoolError, PoolKindError, PoolOwner, PoolView
from cache.pools.shared_memory import KIND as SHARED_MEMORY
from cache.pools.shared_memory import SharedMemoryPool, SharedMemoryView
from epd.messages import Pool
from epd.process.hosts import this_host

__all__ = [
    "CUDA_IPC",
    "DEVICE_KINDS",
    "KINDS",
    "SHARED_MEMORY",
    "DevicePoolView",
    "PoolError",
    "PoolKindError",
    "PoolOwner",
    "PoolView",
    "create",
    "open_view",
]

CUDA_IPC = "cuda_ipc"
DEVICE_KINDS = frozenset({CUDA_IPC})  # pools that take and give tensors; the others bytes


def _cuda_ipc_pool(pool_id: str, nbytes: int, checksum: bool) -> PoolOwner:
    from cache.pools.cuda_ipc import CudaIpcPool

    return CudaIpcPool(pool_id, nbytes, checksum)


def _cuda_ipc_view(pool: Pool) -> PoolView:
    from cache.pools.cuda_ipc import CudaIpcView

    return CudaIpcView(pool)


_OWNERS: dict[str, Callable[[str, int, bool], PoolOwner]] = {
    SHARED_MEMORY: SharedMemoryPool,
    CUDA_IPC: _cuda_ipc_pool,
}
_VIEWS: dict[str, Callable[[Pool], PoolView]] = {SHARED_MEMORY: SharedMemoryView, CUDA_IPC: _cuda_ipc_view}

KINDS = tuple(_OWNERS)


def create(kind: str, pool_id: str, nbytes: int, checksum: bool) -> PoolOwner:
    """Makes a pool of `nbytes` bytes that this process owns; a GPU pool is on the first GPU that the process sees.

    Raises:
        PoolKindError: this kind does not exist here.
        PoolError: it cannot be made.
    """
    _check_kind(kind)
    return _OWNERS[kind](pool_id, nbytes, checksum)


def open_view(pool: Pool) -> PoolView:
    """Opens a pool of this host or another that another process owns (or this one, if it is in shared memory).

    A view of a pool on a GPU takes and gives tensors instead of bytes: see `CudaIpcView`. A view of another host's pool
    connects when it is first used.

    Raises:
        PoolKindError: this kind does not exist here.
        PoolError: it cannot be opened.
    """
    here = this_host()
    if pool.host != here and pool.address:
        from cache.pools.remote import RemoteView

        return RemoteView(pool)
    _check_kind(pool.kind)
    if pool.host != here:
        raise PoolError(f"pool {pool.pool_id} is on host {pool.host}, but this is {here}: set cache.address there")
    return _VIEWS[pool.kind](pool)


def _check_kind(kind: str) -> None:
    if kind == SHARED_MEMORY:
        return
    from cache.pools.cuda_ipc_runtime import why_unavailable

    reason = why_unavailable()
    if kind == CUDA_IPC and reason is None:
        return
    here = [SHARED_MEMORY, *([CUDA_IPC] if reason is None else [])]
    why = f" ({CUDA_IPC}: {reason})" if kind == CUDA_IPC else ""
    raise PoolKindError(f"pools of kind {kind!r} are not available here; available: {', '.join(here)}{why}")

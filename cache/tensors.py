"""Embeddings as tensors: the pools that a process has opened, and tensors that go into and out of their slots.

Lives in the workers, beside the scheduler and beside each model runner (`cache.ec_connector`); needs torch, not vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future

import torch

from cache.pools import DEVICE_KINDS, PoolError, PoolView, open_view
from cache.pools.remote import RemoteView
from cache.slot import StaleSlotError
from epd.messages import Pool, Slot


class PoolTable:
    """The pools that this process has opened, by id. Each is opened once, and closed when it leaves the list."""

    def __init__(self) -> None:
        self._views: dict[str, PoolView] = {}
        self._closed: dict[str, str] = {}
        self.pools: list[Pool] = []

    def update(self, pools: Iterable[Pool]) -> list[str]:
        """Opens new pools and closes those that are gone; returns why some cannot be opened."""
        self.pools, self._closed = list(pools), {}
        wanted = {pool.pool_id for pool in self.pools}
        for pool in self.pools:
            if pool.pool_id not in self._views:
                try:
                    self._views[pool.pool_id] = open_view(pool)
                except PoolError as error:  # it was just replaced, or belongs to another host
                    self._closed[pool.pool_id] = str(error)
        for pool_id in self._views.keys() - wanted:
            self._views.pop(pool_id).close()
        return list(self._closed.values())

    def view(self, slot: Slot) -> PoolView:
        """The pool of a slot.

        Raises:
            StaleSlotError: that pool does not exist (any more), or cannot be opened here.
        """
        try:
            return self._views[slot.pool_id]
        except KeyError:
            reason = self._closed.get(slot.pool_id, f"pool {slot.pool_id} is gone")
            raise StaleSlotError(reason) from None

    def settle(self) -> int:
        """Lets every pool note which of this process's writes are complete; returns how many are not."""
        return sum(view.settle() for view in self._views.values())

    def close(self) -> None:
        """Closes all of them."""
        self.update([])


def read_tensor(pools: PoolTable, slot: Slot) -> torch.Tensor:
    """The embeddings in a slot: `(num_tokens, width)` of the slot's dtype.

    From a pool in host memory it is a verified copy on the CPU; from one on the device it is a view of the pool, and
    the current stream waits until the writer's copy is done.

    Raises:
        StaleSlotError: the slot does not hold what `slot` says.
    """
    data = pools.view(slot).read(slot)
    return data.view(slot.num_tokens, slot.width) if isinstance(data, torch.Tensor) else as_tensor(data, slot)


def as_tensor(data: memoryview, slot: Slot) -> torch.Tensor:
    """A slot's data as embeddings; the tensor shares its memory."""
    return torch.frombuffer(data, dtype=getattr(torch, slot.dtype)).view(slot.num_tokens, slot.width)


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, on the CPU and contiguous."""
    flat = tensor.detach().to("cpu").contiguous().view(torch.uint8).reshape(-1)
    return memoryview(flat.numpy())


def write_tensor(pools: PoolTable, slot: Slot, embeddings: torch.Tensor, owner: str) -> Future[None] | None:
    """Puts embeddings into a slot; on a device this is queued on the current stream, and nothing waits for it.

    Returns:
        None; for a slot on another host a future, done once it is stored.

    Raises:
        StaleSlotError: the slot's pool is gone.
        ValueError: the embeddings do not fit the slot.
    """
    view = pools.view(slot)
    if isinstance(view, RemoteView):
        return view.store(slot, tensor_bytes(embeddings), owner)
    view.write(slot, embeddings if view.pool.kind in DEVICE_KINDS else tensor_bytes(embeddings), owner)
    return None

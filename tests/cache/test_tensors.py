"""The tensors that workers put into pools and take out of them, by kind of pool."""

from __future__ import annotations

import secrets

import pytest

from cache.pools import CUDA_IPC, SHARED_MEMORY, create
from cache.slot import StaleSlotError, slot_bytes
from epd.messages import Pool, Slot

pytestmark = pytest.mark.engine

POOL = Pool(pool_id="device", kind=CUDA_IPC, name="-", nbytes=1 << 20, host="h")


class DeviceView:
    """A stand-in for a pool on a device: it takes and gives tensors."""

    def __init__(self, pool: Pool) -> None:
        self.pool, self.tensors, self.settled, self.unwritten = pool, {}, 0, set()

    def write(self, slot, data, owner):
        self.tensors[slot.offset] = (slot.generation, owner, data)

    def read(self, slot):
        generation, _, data = self.tensors.get(slot.offset, (0, "", None))
        if generation != slot.generation:
            raise StaleSlotError(f"generation {generation} is here")
        return data

    def check(self, slot):
        self.read(slot)
        return slot.offset not in self.unwritten

    def settle(self):
        self.settled += 1
        return len(self.unwritten)

    def close(self):
        self.tensors.clear()


def slot_in(pool_id: str, generation: int = 7) -> Slot:
    return Slot(
        pool_id=pool_id, offset=0, nbytes=slot_bytes(4, 8, "bfloat16"), generation=generation, num_tokens=4, width=8,
        dtype="bfloat16",
    )  # fmt: skip


@pytest.fixture
def embeddings():
    import torch

    torch.manual_seed(0)
    return torch.randn(4, 8).to(torch.bfloat16)


def test_embeddings_survive_a_pool_in_host_memory(embeddings) -> None:
    from cache.tensors import PoolTable, read_tensor, write_tensor

    owner, pools = create(SHARED_MEMORY, secrets.token_hex(4), 1 << 16, True), PoolTable()
    try:
        pools.update([owner.descriptor()])
        slot = slot_in(owner.descriptor().pool_id)
        write_tensor(pools, slot, embeddings, "e0")
        assert read_tensor(pools, slot).equal(embeddings)
        with pytest.raises(StaleSlotError, match="generation 7"):
            read_tensor(pools, slot_in(slot.pool_id, 8))
        pools.update([])
        with pytest.raises(StaleSlotError, match="is gone"):
            read_tensor(pools, slot)
    finally:
        pools.close()
        owner.close()


def test_a_pool_on_a_device_is_given_the_tensor_and_shows_it_without_a_copy(monkeypatch, embeddings) -> None:
    from cache import tensors

    monkeypatch.setattr(tensors, "open_view", DeviceView)
    pools = tensors.PoolTable()
    pools.update([POOL])
    slot = slot_in("device")
    tensors.write_tensor(pools, slot, embeddings, "e0")
    found = tensors.read_tensor(pools, slot)
    assert found.data_ptr() == embeddings.data_ptr()
    assert tuple(found.shape) == (4, 8)
    pools.settle()
    assert pools.view(slot).settled == 1

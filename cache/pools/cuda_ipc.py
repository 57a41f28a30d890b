"""Pools in GPU memory: one allocation that the cache daemon owns and the workers of its host open by CUDA IPC.

Lives in the cache daemon (`CudaIpcPool`, which owns the memory and the header table) and in the workers
(`CudaIpcView`). Headers are in shared memory, see `cache.pools.cuda_ipc_headers`; only opening and closing wait for the
GPU. A view belongs to one thread; a process may have several views of one pool.

**Handover.** A writer puts its copy on its stream, records an event behind it, and publishes the header, which names
the event. A reader checks the header; `read` lets its stream wait for that event and gives a tensor that shows the
slot. Workers first `check` whether the event is done, and read once it is (ADR 18). Each writer has a ring of events
and publishes their handles once. If an event is used again before a reader has waited for it, the reader waits for a
later
copy than it needs: before an event is recorded again, the stream waits for its previous record, on whatever stream that
was, so a record always covers the ones before it.

**Dead writers.** CUDA does not define what waiting for an event does once the process that made it has freed it or
ended. So a writer marks slots whose copy it has seen done as settled (`settle`, and each `write`); a settled slot needs
no event and outlives its writer. A slot that is not settled and whose writer is dead is refused. One case remains: a
writer that dies between this check and the end of its copy. `write` returns before the encoder has run, so that window
is as long as everything queued on the writer's stream: up to hundreds of milliseconds. A stream that waits for the
event may then wait for ever, and so may everything that waits for the whole device, such as unmapping the pool. The
worker's engine hangs; after `broker.hung_after_s` the worker ends, and its supervisor starts another. A reader that has
seen `check` succeed is safe: nothing waits then, and the slot is settled. `tests/gpu/run.py` shows what a GPU does.

**Reuse.** A reader's view shows the pool itself, so a slot must not be written while a step that reads it may still
run. The index keeps it pinned until PREFILLED, which the prefill worker says after the step. If a request was
called off, a copy into a slot that now belongs to another patch may still be queued: the writer that has these bytes
now lets its stream wait for such copies first, unless their writer is dead. There are no checksums: they would need the
data on the CPU.

**Containers.** They must share `/dev/shm`, where CUDA also keeps what it needs for events, and the namespace of process
ids: others have found that memory handles cannot be opened in another one (UCX pull request 11513).

**The owner must outlive its views.** CUDA does not define what happens when memory is freed that another process has
open. So the daemon's `close` first retires the table, which makes every later read a stale slot, and then frees.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cache.pools.base import PoolError, check_pool_id
from cache.pools.cuda_ipc_events import EVENTS, Events, Writer
from cache.pools.cuda_ipc_headers import HeaderTable, Location, Record, decode_location, granule_for, table_bytes
from cache.pools.cuda_ipc_runtime import CupyRuntime, Runtime
from cache.pools.shared_memory import DIRECTORY, SharedMemoryPool, SharedMemoryView
from cache.slot import HEADER_BYTES, StaleSlotError, data_bytes, pack_header
from epd.messages import Pool, Slot
from epd.process.hosts import this_host

KIND = "cuda_ipc"

# cudaMalloc may cut small allocations out of a block of 2 MiB, and an IPC handle always shares the whole block.
_GRAIN = 2 << 20


class CudaIpcPool:
    """Owns `nbytes` bytes of memory of one GPU, and the header table beside it.

    Args:
        pool_id: its id, part of the table's file name.
        nbytes: its size; rounded up to 2 MiB on the device, so that nothing else is shared with it.
        checksum: ignored, there for `cache.pools.create`; pools on GPUs have none.
        device: the GPU, as this process counts them.
        runtime: CUDA; CuPy's if None.
        directory: where the table goes.

    Raises:
        PoolKindError: there is no CUDA here.
        PoolError: there is not enough memory, or the table cannot be made.
    """

    def __init__(
        self,
        pool_id: str,
        nbytes: int,
        checksum: bool = False,
        *,
        device: int = 0,
        runtime: Runtime | None = None,
        directory: Path = DIRECTORY,
    ) -> None:
        check_pool_id(pool_id)
        if nbytes <= 0:
            raise PoolError(f"a pool of {nbytes} bytes")
        self._runtime = runtime if runtime is not None else CupyRuntime()
        self._device = device
        self._address = 0
        self._segment = SharedMemoryPool(pool_id, table_bytes(nbytes), checksum=False, directory=directory)
        segment = self._segment.descriptor()
        self._headers: _Segment | None = None
        try:
            self._headers = _Segment(segment, nbytes, make=True)
            with _explained(f"no room for a pool of {nbytes} bytes on GPU {device}: lower cache.pool_bytes"):
                self._address = self._runtime.allocate(device, -(-nbytes // _GRAIN) * _GRAIN)
            with _explained(f"the memory of pool {pool_id} on GPU {device} cannot be shared"):
                memory, bus_id = self._runtime.export_memory(device, self._address), self._runtime.bus_id(device)
        except BaseException:
            self.close()
            raise
        self._descriptor = Pool(
            pool_id=pool_id,
            kind=KIND,
            name=Location(memory=memory, device=bus_id, headers=segment.name, headers_nbytes=segment.nbytes).encode(),
            nbytes=nbytes,
            host=this_host(),
            checksum=False,
            min_slot_bytes=granule_for(nbytes),
        )

    def descriptor(self) -> Pool:
        """What others need to open it; `name` is a `Location`."""
        return self._descriptor

    def close(self) -> None:
        """Refuses all further reads, then gives the memory back. Views should be closed first, see the module."""
        if self._headers is not None:
            self._headers.table.retire()
            self._headers.close()
            self._headers = None
        self._segment.close()
        if self._address:
            address, self._address = self._address, 0
            self._runtime.free(self._device, address)


class CudaIpcView:
    """Opens a pool that another process owns, to read and write; the owner's own process cannot open it.

    Args:
        pool: the pool.
        runtime: CUDA; CuPy's if None.
        events: the events of this process.

    Raises:
        PoolKindError: there is no CUDA here.
        PoolError: the pool is not there, or its GPU is not visible to this process.
    """

    def __init__(self, pool: Pool, *, runtime: Runtime | None = None, events: Events = EVENTS) -> None:
        self._runtime = runtime if runtime is not None else CupyRuntime()
        self._events = events
        self._pool = pool
        location = decode_location(pool.name)
        segment = Pool(
            pool_id=pool.pool_id,
            kind="shared_memory",
            name=location.headers,
            nbytes=location.headers_nbytes,
            host=pool.host,
        )
        with _explained(f"pool {pool.pool_id}: GPU {location.device} is not visible to this process"):
            self._device = self._runtime.device_at(location.device)
        self._headers: _Segment | None = _Segment(segment, pool.nbytes)
        try:
            with _explained(f"pool {pool.pool_id}: its memory on GPU {location.device} cannot be opened"):
                self._memory = self._runtime.open_memory(self._device, location.memory, pool.nbytes)
        except BaseException:
            self._headers.close()
            raise
        self._writer: Writer | None = None

    @property
    def pool(self) -> Pool:
        """The pool it shows."""
        return self._pool

    def write(self, slot: Slot, data: Any, owner: str) -> None:
        """Queues the copy of a tensor into a slot on the tensor's current stream, and publishes the header.

        Readers may use the slot once this returns. Other streams must not reuse the tensor's memory before the copy has
        run (torch ensures that if the tensor belongs to the current stream).

        Args:
            slot: where.
            data: a tensor `(num_tokens, width)` of the slot's dtype, on a GPU.
            owner: the incarnation of the encode worker.

        Raises:
            ValueError: `data` or `owner` does not fit the slot, or the slot not the pool; then nothing has changed.
            PoolError: CUDA fails, or too many processes write to this pool; then nobody reads the slot.
        """
        table = self._table()
        position = table.position(slot)
        header = pack_header(slot, owner, None)
        found = (tuple(data.shape), str(data.dtype).removeprefix("torch."))
        if found != ((slot.num_tokens, slot.width), slot.dtype):
            raise ValueError(f"{found[0]} of {found[1]}; the slot is for {slot.num_tokens} x {slot.width} {slot.dtype}")
        if (device := self._runtime.device_of(data)) is None:
            raise ValueError("the tensor is on the CPU; this pool takes tensors on a GPU")
        with _explained(f"pool {self._pool.pool_id}: slot at {slot.offset} not written"):
            if self._writer is None:
                self._writer = Writer(self._runtime, table, self._events, device)
            self._writer.write(position, slot, header, self._show(slot), data, device)

    def read(self, slot: Slot, *, copy: bool = False) -> Any:
        """A tensor `(num_tokens, width)` that shows the slot, for use on the current stream of the pool's GPU.

        Args:
            slot: what is expected, and where.
            copy: return a separate tensor instead, copied on that stream.

        Raises:
            StaleSlotError: the slot holds something else, or may never be complete since its writer is dead.
            PoolError: CUDA fails.
        """
        table = self._table()
        record = table.check(slot)
        with _explained(f"pool {self._pool.pool_id}: slot at {slot.offset} not read"):
            if not record.settled:
                self._wait_for(slot, record)
            tensor = self._show(slot)
            return tensor.clone() if copy else tensor

    def check(self, slot: Slot) -> bool:
        """Whether the copy into a slot is done; if so it is settled, and its writer's death cannot make `read` fail.

        Raises:
            StaleSlotError, PoolError: as for `read`.
        """
        table = self._table()
        record = table.check(slot)
        if record.settled:
            return True
        with _explained(f"pool {self._pool.pool_id}: slot at {slot.offset} not checked"):
            event = self._event_of(slot, record)
            if event is not None and not self._runtime.is_done(event):
                return False
            if event is not None and self._event_of(slot, record) is None:
                return True
        if table.check(slot)[:-1] != record[:-1]:
            raise StaleSlotError("written again meanwhile")
        table.settle(table.position(slot), slot.generation)
        return True

    def settle(self) -> int:
        """Marks finished writes of this process, so that they outlive it. Costs microseconds.

        Returns:
            How many copies are not known to be done.

        Raises:
            PoolError: CUDA fails.
        """
        if self._writer is None:
            return 0
        with _explained(f"pool {self._pool.pool_id}: a copy has failed"):
            return self._writer.settle()

    def close(self) -> None:
        """Settles what this process wrote, and closes the view; its memory is unmapped with the last tensor of it.

        Its events stay, see `Events`.
        """
        if self._headers is None:
            return
        if self._writer is not None:
            with contextlib.suppress(RuntimeError):
                self._writer.finish()
            self._writer = None
        self._headers.close()
        self._headers = None
        self._memory = None

    def _table(self) -> HeaderTable:
        if self._headers is None:
            raise StaleSlotError(f"the view of pool {self._pool.pool_id} is closed")
        return self._headers.table

    def _show(self, slot: Slot) -> Any:
        import torch

        start = slot.offset + HEADER_BYTES
        data = self._memory[start : start + data_bytes(slot.num_tokens, slot.width, slot.dtype)]
        return data.view(getattr(torch, slot.dtype)).view(slot.num_tokens, slot.width)

    def _wait_for(self, slot: Slot, record: Record) -> None:
        if (event := self._event_of(slot, record)) is None:
            return
        self._runtime.wait(event, self._device)
        if self._table().check(slot)[:-1] != record[:-1]:
            raise StaleSlotError("written again meanwhile")

    def _event_of(self, slot: Slot, record: Record) -> int | None:
        """The event that stands for the copy into a slot; None if that is done."""
        table = self._table()
        event = self._events.find(record.event, table, self._runtime, self._device)
        if event is None and not table.check(slot).settled:  # it may have settled before it died
            raise StaleSlotError(f"{record.owner} has died, perhaps before it had written this")
        return event


class _Segment:
    """The mapped header table of a pool, with a separate file for the locks."""

    def __init__(self, segment: Pool, nbytes: int, *, make: bool = False) -> None:
        self._view = SharedMemoryView(segment)
        self._fd = os.open(segment.name, os.O_RDWR | os.O_NOFOLLOW)
        try:
            self.table = HeaderTable(self._view.memory, self._fd, nbytes, make=make)
        except PoolError:
            self.close()
            raise

    def close(self) -> None:
        """Closes both; a writer's lock goes with it."""
        os.close(self._fd)
        self._view.close()


@contextlib.contextmanager
def _explained(text: str) -> Iterator[None]:
    """Turns what CUDA raises into a PoolError."""
    try:
        yield
    except PoolError:
        raise
    except RuntimeError as error:
        raise PoolError(f"{text} ({error})") from error

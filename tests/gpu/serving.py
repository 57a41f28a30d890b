"""The processes of `tests/gpu/run.py` that answer: the owner of the pool, and the reader.

The reader answers a batch when it has checked it on the GPU; only then does the writer use those slots again, as
the index pins them in production.
"""

from __future__ import annotations

import sys
import time
from multiprocessing.connection import wait
from pathlib import Path

import msgspec

from cache.pools.cuda_ipc import CudaIpcPool, CudaIpcView
from cache.pools.shared_memory import sweep_stale
from cache.slot import HEADER_BYTES, StaleSlotError
from epd.messages import Pool, Slot
from tests.gpu.common import POOL_BYTES, POOL_ID, pattern


def own(parent):
    """Owns the pool: tells of the machine and the pool, then of memory, then gives it back. Needs CuPy, not torch."""
    import importlib.metadata

    import cupy
    from cupy.cuda import runtime

    sweep_stale()  # what a run that was killed has left
    free_before, _ = runtime.memGetInfo()
    pool = CudaIpcPool(POOL_ID, POOL_BYTES)
    try:
        machine = {
            "gpu": runtime.getDeviceProperties(0)["name"].decode(),
            "driver": driver_version(),
            "cuda_driver": runtime.driverGetVersion(),
            "cuda_runtime": runtime.runtimeGetVersion(),
            "cupy": cupy.__version__,
            "torch": importlib.metadata.version("torch"),
            "python": sys.version.split()[0],
        }
        parent.send(("ok", (machine, msgspec.to_builtins(pool.descriptor()))))
        while True:
            (request,) = parent.recv()
            if request == "close":
                break
            parent.send(("ok", free_before - runtime.memGetInfo()[0]))
    finally:
        pool.close()
    parent.send(("ok", free_before - runtime.memGetInfo()[0]))


def driver_version():
    """The version of the NVIDIA driver, from the kernel; "" where it does not say."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text().split()
    except OSError:
        return ""
    return next((word for word in words if word.count(".") >= 1 and word[0].isdigit()), "")


def read(parent, pool, peer):
    """Answers the writer's and the parent's requests until the parent says close."""
    import torch

    torch.cuda.set_device(0)
    torch.cuda.init()
    began = time.perf_counter()
    view = CudaIpcView(Pool(**pool))
    parent.send(("ok", (time.perf_counter() - began) * 1e3))
    connections = [parent, peer]
    with torch.cuda.stream(torch.cuda.Stream()):
        reader = Reader(view)
        while True:
            for connection in wait(connections):
                try:
                    name, *arguments = connection.recv()
                except EOFError:
                    connections.remove(connection)
                    continue
                if name == "close":
                    view.close()
                    parent.send(("ok", None))
                    return
                if (answer := getattr(reader, name)(*arguments)) is not None:
                    connection.send(("ok", answer))


class Reader:
    """What the reader can be asked; a method that gives None sends no answer."""

    def __init__(self, view):
        import torch

        self.torch = torch
        self.view = view
        self.wait_for = view._wait_for
        self.start()

    def start(self):
        """A new batch."""
        self.bad = self.torch.zeros((), dtype=self.torch.int64, device="cuda")
        self.stale_accepted = self.stale_refused = 0

    def check(self, slot, seed):
        """Reads a slot and compares it, on the GPU."""
        tensor = self.view.read(Slot(**slot))
        self.bad += (tensor.view(self.torch.int32).reshape(-1) != pattern(tensor.nbytes, seed)).any()

    def refuse(self, slot):
        """Reads a slot that must be refused."""
        try:
            self.view.read(Slot(**slot))
            self.stale_accepted += 1
        except StaleSlotError:
            self.stale_refused += 1

    def end(self):
        """Waits for the batch; how many slots were wrong, accepted though stale, and refused."""
        answer = (int(self.bad.item()), self.stale_accepted, self.stale_refused)
        self.start()
        return answer

    def without_events(self, off):
        """From now on, reads do not wait for events (or do again)."""
        self.view._wait_for = (lambda slot, record: None) if off else self.wait_for
        return True

    def time_reads(self, slots, repeats):
        """The times of reading these slots in us, the bytes torch has allocated for it, and whether all are views."""
        slots = [Slot(**slot) for slot in slots]
        self.view.read(slots[0])
        base = self.view._memory.data_ptr()
        before, times, inside = self.torch.cuda.memory_allocated(), [], True
        for _ in range(repeats):
            began = time.perf_counter()
            tensors = [self.view.read(slot) for slot in slots]
            times.append((time.perf_counter() - began) * 1e6)
            for slot, tensor in zip(slots, tensors, strict=True):
                inside &= tensor.data_ptr() == base + slot.offset + HEADER_BYTES
                inside &= slot.offset + HEADER_BYTES + tensor.nbytes <= POOL_BYTES
        return times, self.torch.cuda.memory_allocated() - before, inside

    def touch(self, slots):
        """Makes views of these slots and answers at once."""
        for slot in slots:
            self.view.read(Slot(**slot))
        return True

    def consume(self, slot):
        """Reads a slot, uses it on the GPU, and answers when that is done."""
        self.view.read(Slot(**slot)).sum()
        self.torch.cuda.current_stream().synchronize()
        return True

    def after_death(self, slots):
        """What is read of a writer that was killed: a settled slot, and one whose copy never ran."""
        settled, unfinished = slots
        self.start()
        self.check(settled, 1)
        self.refuse(unfinished)
        wrong, accepted, _ = self.end()
        return {"settled_right": wrong == 0, "unfinished_refused": accepted == 0}

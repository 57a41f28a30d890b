"""The processes of `tests/gpu/run.py` that answer: the owner of the pool, the reader, and a reader that is killed.

The reader answers a batch when it has checked it on the GPU; only then does the writer use those slots again, as
the index pins them in production.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path

import msgspec

from cache.pools.cuda_ipc import CudaIpcPool, CudaIpcView
from cache.pools.cuda_ipc_runtime import CupyRuntime
from cache.pools.shared_memory import DIRECTORY, sweep_stale
from cache.slot import HEADER_BYTES, StaleSlotError
from epd.messages import Pool, Slot
from tests.gpu.common import POOL_BYTES, POOL_ID, consume, contents, differs, why_not

COMPUTE_MODES = ("default", "exclusive thread", "prohibited", "exclusive process")
STUCK_S = 5.0


def tell_why_not(parent):
    """Sends why nothing can run here, or None."""
    parent.send(("ok", why_not()))


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
            "compute mode": COMPUTE_MODES[runtime.deviceGetAttribute(runtime.cudaDevAttrComputeMode, 0)],
            "driver": driver_version(),
            "cuda driver": runtime.driverGetVersion(),
            "cuda runtime": runtime.runtimeGetVersion(),
            "cupy": cupy.__version__,
            "torch": importlib.metadata.version("torch"),
            "python": sys.version.split()[0],
            "kernel": os.uname().release,
            "shm bytes": shutil.disk_usage(DIRECTORY).total,
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
    """Answers the writer's and the parent's requests until the parent says close, or is gone."""
    import cupy
    import torch

    torch.cuda.set_device(0)
    torch.zeros(1, device="cuda")
    cupy.cuda.runtime.deviceSynchronize()
    began = time.perf_counter()
    plain = CudaIpcView(Pool(**pool))
    parent.send(("ok", (time.perf_counter() - began) * 1e3))
    connections = [parent, peer]
    with torch.cuda.stream(torch.cuda.Stream()):
        reader = Reader(pool, plain)
        while True:
            for connection in wait(connections):
                try:
                    name, *arguments = connection.recv()
                except EOFError:
                    if connection is parent:
                        return
                    connections.remove(connection)
                    continue
                if name == "close":
                    reader.close()
                    parent.send(("ok", None))
                    return
                if (answer := getattr(reader, name)(*arguments)) is not None:
                    connection.send(("ok", answer))


class CountingRuntime(CupyRuntime):
    """Counts the events that are waited for, and those of them that are pending then."""

    def __init__(self):
        super().__init__()
        self.waited = self.pending = 0

    def wait(self, event, device):
        self.waited += 1
        self.pending += not self.is_done(event)
        super().wait(event, device)


class Reader:
    """What the reader can be asked; a method that gives None sends no answer.

    It has two views, as vLLM's two connectors in one process have: one counts what it waits for, `plain` is timed.
    """

    def __init__(self, pool, plain):
        import torch

        self.torch = torch
        self.runtime = CountingRuntime()
        self.view = CudaIpcView(Pool(**pool), runtime=self.runtime)
        self.plain = plain
        self.wait_for = self.view._wait_for
        self.start()

    def start(self):
        """A new batch."""
        self.bad = self.torch.zeros((), dtype=self.torch.int64, device="cuda")
        self.checked = self.stale_accepted = self.stale_refused = self.looks = 0
        self.runtime.waited = self.runtime.pending = 0

    def check(self, slot):
        """Reads a slot and compares it, on the GPU."""
        self._check(self.view, Slot(**slot))

    def check_by_both(self, slot):
        """The same by both views."""
        for view in (self.view, self.plain):
            self._check(view, Slot(**slot))

    def _check(self, view, slot):
        self.bad += differs(view.read(slot), slot)
        self.checked += 1

    def look_until_written(self, slot):
        """Looks at a slot until it is written, for `STUCK_S` at most, then reads it, which must not wait any more."""
        until = time.monotonic() + STUCK_S
        while not self.view.check(Slot(**slot)) and time.monotonic() < until:
            self.looks += 1
            time.sleep(0.0002)
        self.check(slot)

    def refuse(self, slot):
        """Reads a slot that must be refused."""
        try:
            self.view.read(Slot(**slot))
            self.stale_accepted += 1
        except StaleSlotError:
            self.stale_refused += 1

    def end(self):
        """Waits for the batch; what was counted in it."""
        counts = {
            "checked": self.checked,
            "mismatches": int(self.bad.item()),
            "stale_accepted": self.stale_accepted,
            "stale_refused": self.stale_refused,
            "waited": self.runtime.waited,
            "waited_for_pending": self.runtime.pending,
            "looks": self.looks,
        }
        self.start()
        return counts

    def without_events(self, off):
        """From now on, reads do not wait for events (or do again)."""
        self.view._wait_for = (lambda slot, record: None) if off else self.wait_for
        return True

    def rewrite(self, slot):
        """Writes a slot, whose bytes were another's, and answers before it is copied."""
        slot = Slot(**slot)
        self.view.write(slot, contents(slot), "reader")
        return True

    def time_reads(self, slots, repeats):
        """Times reading these slots.

        Gives the times in us, the bytes torch has allocated for it, whether all are views, and how many are settled.
        """
        slots = [Slot(**slot) for slot in slots]
        settled = sum(self.plain._table().check(slot).settled for slot in slots)
        self.plain.read(slots[0])
        base = self.plain._memory.data_ptr()
        before, times, inside = self.torch.cuda.memory_allocated(), [], True
        for _ in range(repeats):
            began = time.perf_counter()
            tensors = [self.plain.read(slot) for slot in slots]
            times.append((time.perf_counter() - began) * 1e6)
            for slot, tensor in zip(slots, tensors, strict=True):
                inside &= tensor.data_ptr() == base + slot.offset + HEADER_BYTES
                inside &= slot.offset + HEADER_BYTES + tensor.nbytes <= POOL_BYTES
        return times, self.torch.cuda.memory_allocated() - before, inside, settled

    def touch(self, slots):
        """Makes views of these slots and answers at once."""
        for slot in slots:
            self.plain.read(Slot(**slot))
        return True

    def consume(self, slot):
        """Reads a slot, uses it on the GPU, and answers when that is done."""
        consume(self.plain, Slot(**slot))
        return True

    def after_death(self, slots):
        """What is read of a writer that was killed: a settled slot, and one whose copy never ran."""
        settled, unfinished = slots
        self.start()
        self.check(settled)
        self.refuse(unfinished)
        counts = self.end()
        return {"settled_right": counts["mismatches"] == 0, "unfinished_refused": counts["stale_refused"] == 1}

    def close(self):
        """Closes both views."""
        self.view.close()
        self.plain.close()


def sacrifice(parent, pool):
    """Lets a stream wait for a copy whose writer is killed then, tells what becomes of it, and waits to be killed.

    Nothing here waits for the GPU after that, since it might be for ever.
    """
    import torch

    torch.cuda.set_device(0)
    view = CudaIpcView(Pool(**pool))
    parent.send(("ok", None))
    (slots,) = parent.recv()
    settled, unfinished = (Slot(**slot) for slot in slots)
    with torch.cuda.stream(torch.cuda.Stream()):
        stream = torch.cuda.current_stream()
        consume(view, settled)  # loads the kernel, which may wait for the device
        view.read(unfinished).sum()
        parent.send(("ok", not stream.query()))
        parent.recv()
        began = time.monotonic()
        try:
            while not stream.query() and time.monotonic() - began < STUCK_S:
                time.sleep(0.01)
            seconds = time.monotonic() - began
            outcome = f"released within {seconds:.2f} s" if stream.query() else f"stuck for {seconds:.2f} s"
        except RuntimeError as error:
            outcome = f"failed: {error}"
        parent.send(("ok", outcome))
        parent.recv()

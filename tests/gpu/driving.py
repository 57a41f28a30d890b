"""The processes of `tests/gpu/run.py` that write: the one that drives all phases, and the one that is killed.

The writer names slots to the reader over a pipe right after `write` returns, before the GPU has copied anything.
"""

from __future__ import annotations

import random
from collections import Counter

import msgspec

from cache.pools.cuda_ipc import CudaIpcView
from epd.messages import Pool
from tests.gpu import measuring
from tests.gpu.common import ITEMSIZE, MIB, POOL_BYTES, contents, differs, make_slot, pattern

BATCH = 100
SLEEP_CYCLES = 40_000_000  # about 20 ms of a busy stream: longer than it takes to queue a batch


def drive(parent, pool, peer, num_writes):
    """Runs all phases against the reader; sends the results."""
    import torch

    torch.cuda.set_device(0)
    writer = Writer(CudaIpcView(Pool(**pool)), CudaIpcView(Pool(**pool)), peer)
    results = {
        "correctness": writer.correctness(num_writes),
        "without_events": writer.control(),
        "two_views": writer.two_views(),
        "looked_at": writer.looked_at(),
        "reuse": writer.reuse(),
    }
    source = pattern(500_000_000, 3).view(torch.bfloat16)
    results["views"] = measuring.views(writer, source)
    results["bandwidth"] = measuring.bandwidth(writer, source)
    results["handover"] = measuring.handover(writer, source)
    del source
    torch.cuda.synchronize()
    parent.send(("ok", results))
    parent.recv()
    writer.view.close()
    writer.second.close()
    parent.send(("ok", None))


def write_slowly(parent, pool, generation):
    """Writes one slot to the end and one behind a kernel of about 2 s, then waits to be killed."""
    import torch

    torch.cuda.set_device(0)
    view = CudaIpcView(Pool(**pool))
    slots = [make_slot(index * 16 * MIB, generation + index, MIB, "bfloat16") for index in range(2)]
    data = [contents(slot) for slot in slots]
    view.write(slots[0], data[0], "doomed")
    torch.cuda.synchronize()
    view.settle()
    torch.cuda._sleep(100 * SLEEP_CYCLES)
    view.write(slots[1], data[1], "doomed")
    parent.send(("ok", [msgspec.to_builtins(slot) for slot in slots]))
    parent.recv()


WRONG = (
    lambda slot: {"generation": slot.generation + 1},
    lambda slot: {"generation": slot.generation - 1},
    lambda slot: {"owner": "another"},
    lambda slot: {"dtype": "float16" if slot.dtype == "bfloat16" else "bfloat16"},
    lambda slot: {"width": slot.width - 2},
    lambda slot: {"num_tokens": slot.num_tokens + 1},
    lambda slot: {"offset": POOL_BYTES - 256},
)


class Writer:
    """The phases; `second` is another view of the pool, as vLLM has two in a process; `peer` the pipe to the reader."""

    def __init__(self, view, second, peer):
        import torch

        self.torch = torch
        self.view = view
        self.second = second
        self.peer = peer
        self.generation = 0
        self.rng = random.Random(1)
        self.streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]

    def ask(self, name, *arguments):
        """A request to the reader, and its answer."""
        self.peer.send((name, *arguments))
        return self.peer.recv()[1]

    def slot(self, offset, nbytes, dtype="bfloat16"):
        """A slot of a new generation."""
        self.generation += 1
        return make_slot(offset, self.generation, nbytes, dtype)

    def write(self, slot):
        """Writes the contents of a slot; the slot as others are told of it."""
        self.view.write(slot, contents(slot), "writer")
        return msgspec.to_builtins(slot)

    def put(self, source, offset, nbytes):
        """Writes the first `nbytes` of the source; the slot as others are told of it."""
        slot = self.slot(offset, nbytes // 1024 * 1024)
        data = source[: slot.num_tokens * slot.width].view(slot.num_tokens, slot.width)
        self.view.write(slot, data, "writer")
        return msgspec.to_builtins(slot)

    def correctness(self, num_writes):
        """Random writes in batches, and some slots that must be refused: what the reader has counted."""
        counts = Counter(writes=0, bytes=0)
        while counts["writes"] < num_writes:
            size = min(BATCH, num_writes - counts["writes"])
            counts.update(writes=size, bytes=self._batch(size))
            counts.update(self.ask("end"))
        return dict(counts)

    def control(self):
        """A batch of the same, read without waiting for events: what the reader has counted."""
        self.ask("without_events", True)
        self._batch(BATCH)
        counts = self.ask("end")
        self.torch.cuda.synchronize()
        self.ask("without_events", False)
        return counts

    def _batch(self, size):
        """Writes so many slots behind long kernels on all streams, and tells of each right away; the bytes in all."""
        torch, rng, num_bytes = self.torch, self.rng, 0
        for stream in self.streams:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(SLEEP_CYCLES)
        # A batch takes 840 MiB at most, so that it never laps itself.
        offset = rng.randrange(0, POOL_BYTES // 256) * 256
        for _ in range(size):
            dtype = rng.choice(sorted(ITEMSIZE))
            nbytes = 1024 * int(2 ** rng.uniform(0, 13))
            slot = self.slot(offset, nbytes, dtype)
            if slot.offset + slot.nbytes > POOL_BYTES:
                slot = self.slot(0, nbytes, dtype)
            offset = slot.offset + slot.nbytes
            with torch.cuda.stream(rng.choice(self.streams)):
                named = self.write(slot)
            self.peer.send(("check", named))
            if rng.random() < 0.1:
                self.peer.send(("refuse", {**named, **rng.choice(WRONG)(slot)}))
            num_bytes += nbytes
        return num_bytes

    def two_views(self):
        """Slots whose copy is pending, read by two views in the reader, and here by a view that did not write them."""
        torch, other = self.torch, self.streams[1]
        with torch.cuda.stream(other):
            wrong = torch.zeros((), dtype=torch.int64, device="cuda")
        for index in range(20):
            torch.cuda._sleep(SLEEP_CYCLES)
            slot = self.slot(index * 2 * MIB, MIB)
            self.peer.send(("check_by_both", self.write(slot)))
            with torch.cuda.stream(other):
                wrong += differs(self.second.read(slot), slot)
        counts = self.ask("end")
        with torch.cuda.stream(other):
            return {"reader": counts, "writer_mismatches": int(wrong.item())}

    def looked_at(self):
        """Slots whose copy is pending, looked at until it has run and then read without waiting, as workers do it."""
        for index in range(20):
            self.torch.cuda._sleep(SLEEP_CYCLES)
            self.peer.send(("look_until_written", self.write(self.slot(index * 2 * MIB, MIB))))
        return self.ask("end")

    def reuse(self):
        """Slots given away anew, at the same offset or another, while a copy is pending: how many are wrong, of 20."""
        torch, (slow, fast) = self.torch, self.streams[1:]
        wrong = {}
        for who in ("same process", "another process"):
            wrong[who] = 0
            for index in range(20):
                first = self.slot(4 * MIB, 2 * MIB)
                second = self.slot(4 * MIB + index % 2 * MIB // 2, MIB)
                with torch.cuda.stream(slow):
                    torch.cuda._sleep(SLEEP_CYCLES)
                    self.write(first)
                if who == "same process":
                    with torch.cuda.stream(fast):
                        self.write(second)
                else:
                    self.ask("rewrite", msgspec.to_builtins(second))
                torch.cuda.synchronize()
                self.peer.send(("check", msgspec.to_builtins(second)))
                wrong[who] += self.ask("end")["mismatches"]
        return wrong

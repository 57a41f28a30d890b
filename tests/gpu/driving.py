"""The processes of `tests/gpu/run.py` that write: the one that drives all phases, and the one that is killed.

The writer names slots to the reader over a pipe right after `write` returns, before the GPU has copied anything.
"""

from __future__ import annotations

import random
import time

import msgspec

from cache.pools.cuda_ipc import CudaIpcView
from epd.messages import Pool
from tests.gpu.common import ITEMSIZE, MIB, POOL_BYTES, make_slot, pattern, spread

BATCH = 100
SLEEP_CYCLES = 200_000  # about 0.1 ms of a busy stream
BUSY_CYCLES = 4_000_000  # about 2 ms


def drive(parent, pool, peer, num_writes):
    """Runs all phases against the reader; sends the results."""
    import torch

    torch.cuda.set_device(0)
    writer = Writer(CudaIpcView(Pool(**pool)), peer)
    results = {"correctness": writer.correctness(num_writes)}
    results["correctness"]["wrong_without_events"] = writer.control()
    source = pattern(500_000_000, 3).view(torch.bfloat16)
    results["views"] = writer.views(source)
    results["bandwidth"] = writer.bandwidth(source)
    results["handover"] = writer.handover(source)
    del source
    torch.cuda.synchronize()
    parent.send(("ok", results))
    parent.recv()
    writer.view.close()
    parent.send(("ok", None))


def write_slowly(parent, pool):
    """Writes one slot to the end and one behind a long kernel, then waits to be killed."""
    import torch

    torch.cuda.set_device(0)
    view = CudaIpcView(Pool(**pool))
    slots = [make_slot(0, 2 << 40, MIB, "bfloat16"), make_slot(16 * MIB, 3 << 40, MIB, "bfloat16")]
    data = pattern(MIB, 1).view(torch.bfloat16).view(-1, 512)
    view.write(slots[0], data, "doomed")
    torch.cuda.synchronize()
    view.settle()
    torch.cuda._sleep(1000 * BUSY_CYCLES)  # about 2 s
    view.write(slots[1], data, "doomed")
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
    """The phases; `peer` is the pipe to the reader."""

    def __init__(self, view, peer):
        import torch

        self.torch = torch
        self.view = view
        self.peer = peer
        self.generation = 0

    def ask(self, name, *arguments):
        """A request to the reader, and its answer."""
        self.peer.send((name, *arguments))
        return self.peer.recv()[1]

    def slot(self, offset, nbytes, dtype="bfloat16"):
        """A slot of a new generation."""
        self.generation += 1
        return make_slot(offset, self.generation, nbytes, dtype)

    def correctness(self, num_writes):
        """Random writes over several streams, some behind a kernel that takes a while; some slots that must be refused.

        The reader is told of each right away, so that it often comes before the copy has run.
        """
        torch, rng = self.torch, random.Random(1)
        streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
        written = mismatches = accepted = refused = num_bytes = 0
        while written < num_writes:
            # A batch takes 840 MiB at most, so that it never laps itself.
            offset = rng.randrange(0, POOL_BYTES // 256) * 256
            for _ in range(min(BATCH, num_writes - written)):
                dtype = rng.choice(sorted(ITEMSIZE))
                nbytes = 1024 * int(2 ** rng.uniform(0, 13))
                slot = self.slot(offset, nbytes, dtype)
                if slot.offset + slot.nbytes > POOL_BYTES:
                    slot = self.slot(0, nbytes, dtype)
                offset = slot.offset + slot.nbytes
                with torch.cuda.stream(rng.choice(streams)):
                    if rng.random() < 0.1:
                        torch.cuda._sleep(SLEEP_CYCLES)
                    data = pattern(nbytes, slot.generation).view(getattr(torch, dtype)).view(slot.num_tokens, -1)
                    self.view.write(slot, data, "writer")
                named = msgspec.to_builtins(slot)
                self.peer.send(("check", named, slot.generation))
                if rng.random() < 0.1:
                    self.peer.send(("refuse", {**named, **rng.choice(WRONG)(slot)}))
                written += 1
                num_bytes += nbytes
            wrong, let_in, out = self.ask("end")
            mismatches, accepted, refused = mismatches + wrong, accepted + let_in, refused + out
        return {
            "writes": written,
            "bytes": num_bytes,
            "mismatches": mismatches,
            "stale_accepted": accepted,
            "stale_refused": refused,
        }

    def control(self):
        """The same without waiting for events, behind long kernels: slots that come out wrong, of 20."""
        self.ask("without_events", True)
        for index in range(20):
            self.torch.cuda._sleep(5 * BUSY_CYCLES)
            slot = self.slot(index * 4 * MIB, MIB)
            self.view.write(
                slot, pattern(MIB, slot.generation).view(self.torch.bfloat16).view(slot.num_tokens, -1), "w"
            )
            self.peer.send(("check", msgspec.to_builtins(slot), slot.generation))
        wrong, _, _ = self.ask("end")
        self.torch.cuda.synchronize()
        self.ask("without_events", False)
        return wrong

    def put(self, source, offset, nbytes):
        """Writes the first `nbytes` of the source; the slot as others are told of it."""
        slot = self.slot(offset, nbytes // 1024 * 1024)
        data = source[: slot.num_tokens * slot.width].view(slot.num_tokens, slot.width)
        self.view.write(slot, data, "writer")
        return msgspec.to_builtins(slot)

    def views(self, source):
        """Views of sets of embeddings: 5 MB, 500 MB in one slot, 500 MB in 500 slots."""
        results = {}
        for name, count, nbytes in (("5 MB", 1, 5_000_000), ("500 MB", 1, 500_000_000), ("500 x 1 MB", 500, 1_000_000)):
            handovers = []
            for _ in range(20):
                slots = [self.put(source, index * 2 * MIB, nbytes) for index in range(count)]
                self.torch.cuda.synchronize()
                began = time.perf_counter()
                self.ask("touch", slots)
                handovers.append((time.perf_counter() - began) * 1e6)
            times, allocated, inside = self.ask("time_reads", slots, 200 if count == 1 else 20)
            results[name] = {
                **spread("read_us", times),
                **spread("handover_us", handovers),
                "bytes_allocated": allocated,
                "inside_pool": inside,
            }
        return results

    def bandwidth(self, source):
        """Writes into the pool against plain copies of the same size on the same stream, timed by CUDA events."""
        torch, results = self.torch, {}
        target = torch.empty(256 * MIB, dtype=torch.uint8, device="cuda").view(torch.bfloat16)
        for mib in (1, 8, 64, 256):
            count, nbytes = max(5, 512 // mib), mib * MIB
            rates = {}
            for name in ("plain", "pool", "plain", "pool"):  # the first two warm up
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                for _ in range(count):
                    if name == "pool":
                        self.put(source, 0, nbytes)
                    else:
                        target[: nbytes // 2].copy_(source[: nbytes // 2])
                stop.record()
                stop.synchronize()
                rates[name] = count * nbytes / start.elapsed_time(stop) / 1e6
            results[f"{mib} MiB"] = {
                "pool_gb_s": rates["pool"],
                "plain_gb_s": rates["plain"],
                "ratio": rates["pool"] / rates["plain"],
            }
        return results

    def handover(self, source):
        """One patch of 1 MiB at a time from `write` to the end of its use: events against waiting on the CPU.

        "beside other work" has a kernel of about 2 ms running on another stream of the writer.
        """
        torch, results = self.torch, {}
        other = torch.cuda.Stream()
        waits = {
            "events": lambda: None,
            "stream sync": lambda: torch.cuda.current_stream().synchronize(),
            "device sync": torch.cuda.synchronize,
        }
        for beside in ("", " beside other work"):
            for name, cpu_wait in waits.items():
                busy, total = [], []
                for index in range(220):
                    if beside:
                        with torch.cuda.stream(other):
                            torch.cuda._sleep(BUSY_CYCLES)
                    began = time.perf_counter()
                    slot = self.put(source, index % 100 * 2 * MIB, MIB)
                    cpu_wait()
                    busy.append((time.perf_counter() - began) * 1e6)
                    self.ask("consume", slot)
                    total.append((time.perf_counter() - began) * 1e6)
                    torch.cuda.synchronize()
                results[name + beside] = {**spread("writer_us", busy[20:]), **spread("total_us", total[20:])}
        return results

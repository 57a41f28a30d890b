"""The benchmarks of `tests/gpu/run.py`: views, write bandwidth and handover. They run in the writer's process."""

from __future__ import annotations

import statistics
import time

from epd.messages import Slot
from tests.gpu.common import MIB, consume, spread

LEAD_CYCLES = 80_000_000  # about 40 ms: all launches of a measurement are queued behind it
BUSY_CYCLES = 4_000_000  # about 2 ms
SETS = (("5 MB", 1, 5_000_000), ("500 MB", 1, 500_000_000), ("500 x 1 MB", 500, 1_000_000))


def views(writer, source):
    """Views of sets of embeddings: 5 MB, 500 MB in one slot, 500 MB in 500 slots; unsettled, then settled.

    The copies are done before the clock starts, so a handover is the way of the names and the making of the views.
    """
    import torch

    results = {}
    for name, count, nbytes in SETS:
        for state in ("unsettled", "settled"):
            handovers = []
            for _ in range(20):
                # No write of the set sees another's copy done, and so settles it.
                torch.cuda._sleep(BUSY_CYCLES + BUSY_CYCLES // 10 * count)
                slots = [writer.put(source, index * 2 * MIB, nbytes) for index in range(count)]
                torch.cuda.synchronize()
                if state == "settled":
                    writer.view.settle()
                began = time.perf_counter()
                writer.ask("touch", slots)
                handovers.append((time.perf_counter() - began) * 1e6)
            times, allocated, inside, settled = writer.ask("time_reads", slots, 200 if count == 1 else 20)
            results[f"{name}, {state}"] = {
                **spread("read_us", times),
                **spread("handover_us", handovers),
                "bytes_allocated": allocated,
                "inside_pool": inside,
                "slots": count,
                "settled": settled,
            }
    return results


def bandwidth(writer, source):
    """Writes into the pool against plain copies of the same size on the same stream, timed by CUDA events.

    The clock starts behind a kernel that takes longer than queuing them all, so that it times the GPU alone; what a
    write costs the CPU is timed apart. Each figure is the median of five, after one that warms up.
    """
    import torch

    results = {}
    target = torch.empty(256 * MIB, dtype=torch.uint8, device="cuda").view(torch.bfloat16)
    for mib in (1, 8, 64, 256):
        nbytes = mib * MIB
        count = min(128, max(20, 512 // mib))

        def write(nbytes=nbytes):
            writer.put(source, 0, nbytes)

        def copy(nbytes=nbytes):
            target[: nbytes // 2].copy_(source[: nbytes // 2])

        timed = {"pool": [], "plain": []}
        for _ in range(6):
            for name, action in (("plain", copy), ("pool", write)):
                timed[name].append(_timed(action, count))
        ms = {name: statistics.median(run[0] for run in runs[1:]) for name, runs in timed.items()}
        rate = {name: count * nbytes / each / 1e6 for name, each in ms.items()}
        results[f"{mib} MiB"] = {
            "pool_gb_s": rate["pool"],
            "plain_gb_s": rate["plain"],
            "ratio": rate["pool"] / rate["plain"],
            "cpu_us": statistics.median(run[1] for run in timed["pool"][1:]),
            "queued_in_time": all(run[2] for runs in timed.values() for run in runs[1:]),
        }
    return results


def _timed(action, count):
    """Does something `count` times: ms on the GPU in all, us on the CPU each, whether the clock started after that."""
    import torch

    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(LEAD_CYCLES)
    start.record()
    began = time.perf_counter()
    for _ in range(count):
        action()
    cpu_us = (time.perf_counter() - began) * 1e6 / count
    in_time = not start.query()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop), cpu_us, in_time


def handover(writer, source):
    """One patch of 1 MiB at a time from `write` to the end of its use: events against waiting on the CPU.

    "beside other work" has a kernel of about 2 ms running on another stream of the writer. Kernels of two processes
    take turns on a GPU, so that figure has turns of both in it; in one process they run side by side.
    """
    import torch

    results = {}
    other, reading = torch.cuda.Stream(), torch.cuda.Stream()

    def ask(slot):
        writer.ask("consume", slot)

    def consume_here(slot):
        with torch.cuda.stream(reading):
            consume(writer.second, Slot(**slot))

    ways = {
        "events": (lambda: None, ask),
        "stream sync": (lambda: torch.cuda.current_stream().synchronize(), ask),
        "device sync": (torch.cuda.synchronize, ask),
        "events, one process": (lambda: None, consume_here),
    }
    for beside in ("", " beside other work"):
        for name, (cpu_wait, use) in ways.items():
            busy, total = [], []
            for index in range(220):
                if beside:
                    with torch.cuda.stream(other):
                        torch.cuda._sleep(BUSY_CYCLES)
                began = time.perf_counter()
                slot = writer.put(source, index % 100 * 2 * MIB, MIB)
                cpu_wait()
                busy.append((time.perf_counter() - began) * 1e6)
                use(slot)
                total.append((time.perf_counter() - began) * 1e6)
                torch.cuda.synchronize()
            results[name + beside] = {**spread("writer_us", busy[20:]), **spread("total_us", total[20:])}
    return results

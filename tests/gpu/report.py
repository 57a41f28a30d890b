"""What `tests/gpu/run.py` makes of its results: a table, and whether all holds that has to."""

from __future__ import annotations


def _one_in(number, name):
    """Whether the reader has counted one such read in so many."""
    return lambda results: results["correctness"][name] * number >= results["writes_asked"]


def _growth(state):
    """Whether reading 500 MB in one slot takes about as long as 5 MB."""
    return lambda results: (
        results["views"][f"500 MB, {state}"]["read_us_p50"] < 2 * results["views"][f"5 MB, {state}"]["read_us_p50"] + 20
    )


def _two_views(results):
    reader, wrong_in_writer = results["two_views"]["reader"], results["two_views"]["writer_mismatches"]
    all_read = reader["checked"] == 40 and reader["waited_for_pending"] > 0
    return all_read and reader["mismatches"] == wrong_in_writer == 0


# What has to hold, by name; benchmarks' targets included.
CHECKS = {
    "all writes were read": lambda results: results["correctness"]["checked"] == results["writes_asked"],
    "nothing read wrong": lambda results: results["correctness"]["mismatches"] == 0,
    "everything stale refused": lambda results: results["correctness"]["stale_accepted"] == 0,
    "stale slots were tried, one for 20 writes": _one_in(20, "stale_refused"),
    "one read in 10 waited for a pending copy": _one_in(10, "waited_for_pending"),
    "without waiting for events, data would be wrong": lambda results: results["without_events"]["mismatches"] > 0,
    "several views of one process read right": _two_views,
    "what is looked at until it is written is read right, and waits for nothing": lambda results: (
        results["looked_at"]["checked"] == 20
        and results["looked_at"]["looks"] > 0
        and results["looked_at"]["mismatches"] == results["looked_at"]["waited"] == 0
    ),
    "a slot given away anew holds what was written last": lambda results: set(results["reuse"].values()) == {0},
    "every view inside the pool": lambda results: all(row["inside_pool"] for row in results["views"].values()),
    "no view allocates": lambda results: all(row["bytes_allocated"] == 0 for row in results["views"].values()),
    "an unsettled view's time does not grow with its size": _growth("unsettled"),
    "a settled view's time does not grow with its size": _growth("settled"),
    "the clock of each write started after all were queued": lambda results: all(
        row["queued_in_time"] for row in results["bandwidth"].values()
    ),
    "write bandwidth 0.9 of a plain copy (256 MiB)": lambda results: results["bandwidth"]["256 MiB"]["ratio"] >= 0.9,
    "at most 4 GB of device memory": lambda results: results["device_memory_bytes"] <= 4_000_000_000,
    "dead writer's unfinished slot refused": lambda results: results["dead_writer"]["unfinished_refused"],
    "dead writer's settled slot read": lambda results: results["dead_writer"]["settled_right"],
}


def verdict(results):
    """Which of `CHECKS` hold."""
    return {name: bool(holds(results)) for name, holds in CHECKS.items()}


def table(results):
    """The results as lines of text."""
    lines = [f"{key:<14} {value}" for key, value in results["machine"].items()]
    lines += ["", f"{'counted':<64} {'result':>12}"]
    counted = {
        **results["correctness"],
        "wrong without waiting for events, of 100": results["without_events"]["mismatches"],
        "two views of the reader: wrong": results["two_views"]["reader"]["mismatches"],
        "a view that did not write, in the writer: wrong": results["two_views"]["writer_mismatches"],
        "looked at until written: wrong, of 20": results["looked_at"]["mismatches"],
        **{f"given away anew, by {who}: wrong, of 20": wrong for who, wrong in results["reuse"].items()},
        **results["dead_writer"],
        "device_memory_bytes": results["device_memory_bytes"],
        "reader_open_ms": round(results["reader_open_ms"], 1),
    }
    lines += [f"{name:<64} {value!s:>12}" for name, value in counted.items()]
    lines += ["", "a stream that waits for a copy when its writer is killed (a fact, not a check):"]
    lines += [f"  {name}: {value}" for name, value in results["waiting_for_a_dead_writer"].items()]
    lines += [
        "",
        f"{'view of embeddings':<24} {'settled':>8} {'read us p50':>12} {'p99':>8} {'handover us p50':>16} "
        f"{'bytes allocated':>16}",
    ]
    lines += [
        f"{name:<24} {row['settled']:>4}/{row['slots']:<3} {row['read_us_p50']:>12.1f} {row['read_us_p99']:>8.1f} "
        f"{row['handover_us_p50']:>16.1f} {row['bytes_allocated']:>16}"
        for name, row in results["views"].items()
    ]
    lines += ["(handover: names to the reader and views made there; the copies are done before, no GPU work is in it)"]
    lines += ["", f"{'write of':<20} {'pool GB/s':>12} {'plain GB/s':>12} {'ratio':>8} {'CPU us a write':>16}"]
    lines += [
        f"{name:<20} {row['pool_gb_s']:>12.1f} {row['plain_gb_s']:>12.1f} {row['ratio']:>8.3f} {row['cpu_us']:>16.1f}"
        for name, row in results["bandwidth"].items()
    ]
    lines += [
        "",
        f"{'handover of 1 MiB':<40} {'writer busy us p50':>19} {'p99':>8} {'to the end us p50':>18} {'p99':>8}",
    ]
    lines += [
        f"{name:<40} {row['writer_us_p50']:>19.1f} {row['writer_us_p99']:>8.1f} "
        f"{row['total_us_p50']:>18.1f} {row['total_us_p99']:>8.1f}"
        for name, row in results["handover"].items()
    ]
    lines += ["(beside other work: kernels of two processes take turns on a GPU; in one process they run side by side)"]
    lines += ["", f"new in /dev/shm: {', '.join(results['left_in_shared_memory']) or 'nothing'}"]
    lines += [f"does not hold: {name}" for name, holds in results["verdict"].items() if not holds]
    lines += [f"passed: {results['passed']}   took {results['took_s']} s"]
    return "\n".join(lines)

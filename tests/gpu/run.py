"""Everything about pools in GPU memory that only a GPU can show: correctness, then benchmarks; a table and a JSON file.

Run it on a machine with one CUDA GPU (README.md beside this says what it needs): `python tests/gpu/run.py`. The parent
process never touches CUDA. Its children: the owner of a pool, a writer that drives all phases (`driving.py`), a reader
that answers it (`serving.py`), and a writer that is killed. It ends within `LIMIT_S` and ends only its own children.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.gpu import common, driving, serving

LIMIT_S = 280.0


class Failed(Exception):
    """A child failed or said nothing for too long."""


class Children:
    """The processes of a run, each with a pipe; ended by `stop`, whatever happened."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._deadline = time.monotonic() + LIMIT_S
        self._running: dict[str, multiprocessing.process.BaseProcess] = {}
        self._connections = {}
        self.pipe = self._context.Pipe

    def start(self, name, target, *arguments):
        """Starts a child; our end of its pipe."""
        ours, theirs = self.pipe()
        process = self._context.Process(target=common.guarded, args=(target, theirs, *arguments), name=name)
        process.start()
        theirs.close()
        self._running[name], self._connections[name] = process, ours
        return ours

    def ask(self, name, connection, *request):
        """Sends a request (if any) and gives the answer.

        Raises:
            Failed: the child failed, died or ran out of time.
        """
        if request:
            connection.send(request)
        if not connection.poll(max(0.0, self._deadline - time.monotonic())):
            raise Failed(f"{name}: no answer within {LIMIT_S:.0f} s of the start")
        try:
            kind, answer = connection.recv()
        except EOFError:
            raise Failed(f"{name} died with status {self._running[name].exitcode}") from None
        if kind == "error":
            raise Failed(f"{name}:\n{answer}")
        return answer

    def errors(self):
        """What children have to say that nobody has asked for: why they failed."""
        found = []
        for name, connection in self._connections.items():
            try:
                while connection.poll(1):
                    kind, answer = connection.recv()
                    found += [f"{name}:\n{answer}"] if kind == "error" else []
            except (EOFError, OSError):
                continue
        return found

    def kill(self, name):
        """Ends one child at once (SIGKILL) and waits for it."""
        process = self._running.pop(name)
        process.kill()
        process.join(10)

    def stop(self):
        """Ends what still runs: by itself within 5 s, else at once."""
        until = time.monotonic() + 5
        for process in self._running.values():
            process.join(max(0.0, until - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join(10)


def run_all(num_writes):
    """The whole run; the results."""
    children = Children()
    began = time.monotonic()
    try:
        owner = children.start("owner", serving.own)
        machine, pool = children.ask("owner", owner)
        to_reader, to_writer = children.pipe()
        reader = children.start("reader", serving.read, pool, to_writer)
        to_writer.close()
        opened = {"reader_open_ms": children.ask("reader", reader)}
        writer = children.start("writer", driving.drive, pool, to_reader, num_writes)
        to_reader.close()
        results = children.ask("writer", writer)
        results["device_memory_bytes"] = children.ask("owner", owner, "used")

        doomed = children.start("doomed", driving.write_slowly, pool)
        slots = children.ask("doomed", doomed)
        children.kill("doomed")
        results["dead_writer"] = children.ask("reader", reader, "after_death", slots)

        for name, connection in (("writer", writer), ("reader", reader), ("owner", owner)):
            children.ask(name, connection, "close")
    except (Failed, OSError) as error:
        raise Failed("\n".join([str(error), *children.errors()])) from None
    finally:
        children.stop()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine,
        **results,
        **opened,
        "took_s": round(time.monotonic() - began, 1),
    }


def table(results):
    """The results as lines of text."""
    lines = [f"{key:<12} {value}" for key, value in results["machine"].items()]
    correctness, dead = results["correctness"], results["dead_writer"]
    lines += ["", f"{'check':<64} {'result':>12}"]
    for name, value in {**correctness, **dead}.items():
        lines.append(f"{name:<64} {value!s:>12}")
    lines += [
        "",
        f"{'view of embeddings':<20} {'read us p50':>12} {'p99':>8} {'handover us p50':>16} {'bytes copied':>13}",
    ]
    for name, row in results["views"].items():
        lines.append(
            f"{name:<20} {row['read_us_p50']:>12.1f} {row['read_us_p99']:>8.1f} "
            f"{row['handover_us_p50']:>16.1f} {row['bytes_allocated']:>13}"
        )
    lines += ["", f"{'write of':<20} {'pool GB/s':>12} {'plain GB/s':>12} {'ratio':>8}"]
    for name, row in results["bandwidth"].items():
        lines.append(f"{name:<20} {row['pool_gb_s']:>12.1f} {row['plain_gb_s']:>12.1f} {row['ratio']:>8.3f}")
    lines += [
        "",
        f"{'handover of 1 MiB':<32} {'writer busy us p50':>19} {'p99':>8} {'to the end us p50':>18} {'p99':>8}",
    ]
    for name, row in results["handover"].items():
        lines.append(
            f"{name:<32} {row['writer_us_p50']:>19.1f} {row['writer_us_p99']:>8.1f} "
            f"{row['total_us_p50']:>18.1f} {row['total_us_p99']:>8.1f}"
        )
    lines += ["", f"passed: {results['passed']}   took {results['took_s']} s"]
    return "\n".join(lines)


def verdict(results):
    """What has to hold, by name; benchmarks' targets included."""
    correctness, views = results["correctness"], results["views"]
    small, large = views["5 MB"], views["500 MB"]
    return {
        "nothing read wrong": correctness["mismatches"] == 0,
        "everything stale refused": correctness["stale_accepted"] == 0,
        "every view inside the pool": all(row["inside_pool"] for row in views.values()),
        "no view copies": all(row["bytes_allocated"] == 0 for row in views.values()),
        "a view's time does not grow with its size": large["read_us_p50"] < 2 * small["read_us_p50"] + 20,
        "write bandwidth 0.9 of a plain copy (256 MiB)": results["bandwidth"]["256 MiB"]["ratio"] >= 0.9,
        "at most 4 GB of device memory": results["device_memory_bytes"] <= 4_000_000_000,
        "dead writer's unfinished slot refused": results["dead_writer"]["unfinished_refused"],
        "dead writer's settled slot read": results["dead_writer"]["settled_right"],
        "without waiting for events, data would be wrong": correctness["wrong_without_events"] > 0,
    }


def main():
    """Runs everything; 0 where all of `verdict` holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("gpu_pool.json"), help="where the results go")
    parser.add_argument("--writes", type=int, default=10_000, help="random writes that are checked")
    arguments = parser.parse_args()
    try:
        results = run_all(arguments.writes)
    except Failed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    results["verdict"] = verdict(results)
    results["passed"] = all(results["verdict"].values())
    arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))
    for name, holds in results["verdict"].items():
        if not holds:
            print(f"does not hold: {name}")
    return 0 if results["passed"] else 1


if __name__ == "__main__":
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    sys.exit(main())

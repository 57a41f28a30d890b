"""Everything about pools in GPU memory that only a GPU can show: correctness, then benchmarks; a table and a JSON file.

Run it on a machine with one CUDA GPU, torch, and the wheels of cupy-cuda13x, numpy, cuda-pathfinder and msgspec:
`python tests/gpu/run.py` (README.md beside this says more). The parent process never touches CUDA. Its children: the
owner of a pool, a writer that drives all phases (`driving.py`), a reader that answers it (`serving.py`), writers that
are killed, and a reader that is. It ends within `LIMIT_S` and ends only its own children.
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

from tests.gpu import common, driving, report, serving

LIMIT_S = 280.0
SHARED_MEMORY = Path("/dev/shm")


class CannotRun(Exception):
    """There is no GPU here, or something is not installed."""


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
        """Ends one child at once (SIGKILL) and waits for it.

        Raises:
            Failed: it is still there after 10 s.
        """
        process = self._running.pop(name)
        process.kill()
        process.join(10)
        if process.exitcode is None:
            raise Failed(f"{name} (process {process.pid}) is still there 10 s after SIGKILL")

    def stop(self, *keep):
        """Ends what still runs but those named: by itself within 5 s each, else at once.

        The last started is the first to go: the memory of the first, the owner, is mapped by the others.
        """
        for name, process in reversed(list(self._running.items())):
            if name in keep:
                continue
            self._connections[name].close()
            process.join(5)
            if process.exitcode is not None:
                del self._running[name]
                continue
            try:
                self.kill(name)
            except Failed as error:
                print(error, file=sys.stderr)


def run_all(num_writes):
    """The whole run; the results.

    Raises:
        CannotRun: there is no GPU here.
        Failed: a child failed.
    """
    children = Children()
    began, shared_before = time.monotonic(), set(SHARED_MEMORY.iterdir())
    try:
        reason = children.ask("probe", children.start("probe", serving.tell_why_not))
        if reason is not None:
            raise CannotRun(reason)
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

        doomed = children.start("doomed", driving.write_slowly, pool, 1 << 20)
        slots = children.ask("doomed", doomed)
        children.kill("doomed")
        results["dead_writer"] = children.ask("reader", reader, "after_death", slots)
        for name, connection in (("writer", writer), ("reader", reader)):
            children.ask(name, connection, "close")
        results["waiting_for_a_dead_writer"] = wait_for_a_dead_writer(children, pool)
        children.stop("owner")
        children.ask("owner", owner, "close")
    except (Failed, OSError) as error:
        raise Failed("\n".join([str(error), *children.errors()])) from None
    finally:
        children.stop()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "writes_asked": num_writes,
        **results,
        **opened,
        "left_in_shared_memory": sorted(path.name for path in set(SHARED_MEMORY.iterdir()) - shared_before),
        "took_s": round(time.monotonic() - began, 1),
    }


def wait_for_a_dead_writer(children, pool):
    """What becomes of a stream that waits for a copy when its writer is killed: a fact, whatever it is."""
    try:
        reader = children.start("sacrifice", serving.sacrifice, pool)
        children.ask("sacrifice", reader)
        writer = children.start("doomed", driving.write_slowly, pool, 2 << 20)
        slots = children.ask("doomed", writer)
        waiting = children.ask("sacrifice", reader, slots)
        began = time.monotonic()
        children.kill("doomed")
        killed_s = time.monotonic() - began
        outcome = children.ask("sacrifice", reader, "poll")
        children.kill("sacrifice")
    except (Failed, OSError) as error:
        return {"outcome": f"unknown: {error}"}
    return {"was_waiting": waiting, "writer_gone_after_s": round(killed_s, 2), "outcome": outcome}


def main():
    """Runs everything; 0 where all of `report.CHECKS` holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("gpu_pool.json"), help="where the results go")
    parser.add_argument("--writes", type=int, default=10_000, help="random writes that are checked")
    arguments = parser.parse_args()
    try:
        results = run_all(arguments.writes)
    except CannotRun as error:
        print(f"cannot run here: {error}", file=sys.stderr)
        return 1
    except Failed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    results["verdict"] = report.verdict(results)
    results["passed"] = all(results["verdict"].values())
    arguments.json.write_text(json.dumps(results, indent=2) + "\n")
    print(report.table(results), flush=True)
    return 0 if results["passed"] else 1


if __name__ == "__main__":
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    sys.exit(main())

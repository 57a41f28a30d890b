"""What each ring of the tests costs: `python -m tests.rings REPORT.xml...` writes the table of docs/testing.md.

The reports are those of `pytest --junitxml` (`make test` writes `build/tests.xml`), in which a test's seconds are with
its set-up and tear-down, and what tests share is counted with the first and the last of them. `--print` only prints.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import fnmatch
import sys
from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree

PAGE = Path(__file__).resolve().parent.parent / "docs" / "testing.md"
BEGIN, END = "<!-- what each ring costs: python -m tests.rings -->\n", "<!-- end -->\n"

PURE, IN_MEMORY, SOCKETS, ENGINES, GPU = "pure", "in memory", "sockets and processes", "engines", "GPU"
RINGS = {
    PURE: "one function or one part",
    IN_MEMORY: "the broker's core, or a whole cluster with stand-ins for engines, over a transport in memory",
    SOCKETS: "real ZeroMQ, HTTP, shared memory and processes, without an engine",
    ENGINES: "vLLM: engines of one stage, endpoints, and whole pipelines whose daemons are killed",
    GPU: "CUDA IPC between processes; skipped where there is no NVIDIA GPU",
}
# Which files are in the rings that no marker names; all others without a marker are pure.
FILES = {
    IN_MEMORY: (
        "tests/broker/test_core_*", "tests/broker/test_simulation.py", "tests/faults/*", "tests/endpoint/test_asgi.py",
    ),
    SOCKETS: (
        "tests/wire/test_link.py", "tests/wire/test_sockets.py", "tests/local/*", "tests/client/*", "tests/process/*",
        "tests/cache/test_cache_daemon.py", "tests/cache/test_remote_pool.py", "tests/cache/test_shared_memory_pool.py",
        "tests/workers/test_amx.py", "tests/cli/test_command_line.py", "tests/cli/test_engine_options.py",
        "tests/cli/test_light_install.py",
    ),
}  # fmt: skip


@dataclasses.dataclass
class Cost:
    """Tests of one kind, those that were skipped among them, and their seconds."""

    tests: int = 0
    skipped: int = 0
    seconds: float = 0.0


def ring_of(file: str, markers: Iterable[str]) -> str:
    """The ring of a test in `file` (from the repository's root) with these markers."""
    if "gpu" in markers:
        return GPU
    if "engine" in markers:
        return ENGINES
    found = (ring for ring, patterns in FILES.items() if any(fnmatch.fnmatch(file, each) for each in patterns))
    return next(found, PURE)


def costs(reports: Iterable[Path]) -> dict[tuple[str, str], Cost]:
    """The cost of each ring in each folder.

    Raises:
        ValueError: a test in a report has no ring: it was not run with tests/conftest.py.
    """
    found: dict[tuple[str, str], Cost] = collections.defaultdict(Cost)
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            told = {each.get("name"): each.get("value") for each in case.iter("property")}
            if "ring" not in told:
                raise ValueError(f"{report}: {case.get('classname')}.{case.get('name')} has no ring")
            folder = "/".join(str(case.get("classname")).split(".")[:2])
            cost = found[str(told["ring"]), folder if "test_" not in folder else "tests"]
            cost.tests += 1
            cost.skipped += case.find("skipped") is not None
            cost.seconds += float(case.get("time", 0.0))
    return dict(found)


def table(found: dict[tuple[str, str], Cost]) -> str:
    """The costs for people: a line for each ring, and one for each folder that takes more than ten seconds of it."""
    lines = ["| ring | what is real in it | tests | seconds |", "|---|---|---:|---:|"]
    total = Cost()
    for ring, what in RINGS.items():
        folders = {folder: cost for (each, folder), cost in found.items() if each == ring}
        tests, seconds = sum(one.tests for one in folders.values()), sum(one.seconds for one in folders.values())
        skipped = sum(one.skipped for one in folders.values())
        lines.append(f"| **{ring}** | {what} | {tests}{f' ({skipped} skipped)' if skipped else ''} | {seconds:.0f} |")
        for folder, cost in sorted(folders.items(), key=lambda each: -each[1].seconds):
            if cost.seconds > 10:
                lines.append(f"| | `{folder}` | {cost.tests} | {cost.seconds:.0f} |")
        total = Cost(total.tests + tests, total.skipped + skipped, total.seconds + seconds)
    lines.append(f"| **all** | | {total.tests} | {total.seconds:.0f} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str]) -> int:
    """Writes or prints the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.rings", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("reports", nargs="+", type=Path, metavar="REPORT.xml")
    parser.add_argument("--print", action="store_true", help="print the table and write nothing")
    args = parser.parse_args(argv)
    made = table(costs(args.reports))
    if args.print:
        print(made, end="")
        return 0
    head, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    from benchmarks.common import provenance  # which machines with the GPU tests alone cannot import

    where = provenance()
    told = f"On {where['machine']}, {where['date']}, commit {where['commit']}.\n\n"
    PAGE.write_text(head + BEGIN + "\n" + told + made + "\n" + END + rest.partition(END)[2], "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

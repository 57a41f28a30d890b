"""`python -m tests.faults` writes docs/faults.md from the cells; with `--check` it only says if that is needed."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.faults.cells import CELLS, FAULTS

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "faults.md"
_HEAD = """<!-- Generated from tests/faults/cells.py by `python -m tests.faults`; change it there. -->
# Faults
What becomes of requests when something goes wrong between two daemons. In no case is an answer wrong, does a request
never end, or is anything held for it shortly afterwards; the tests check that in every cell. "Right" means that every
answer is that of an undisturbed run.

Each cell is a test. Unless stated otherwise it runs in virtual time (`pytest tests/faults`): the real decision core,
stages and wire encoding, over a transport that applies the fault to each kind of message in turn, or at several times.
The named tests do it with real engines and signals.

ZeroMQ over TCP or IPC neither loses nor repeats nor reorders messages while both ends live, so these rows show what
would still hold if it did. "Stale" is a message from or for an earlier life of a daemon. "Corrupted" is a message that
can no longer be read. A flipped bit that leaves a valid message is not noticed: slots of the cache have our checksums,
sockets have those of their transport.
"""


def page() -> str:
    """The text of docs/faults.md."""
    lines = [_HEAD]
    for edge in dict.fromkeys(cell.edge for cell in CELLS):
        lines += [f"## {edge}", "| fault | outcome | shown by |", "|---|---|---|"]
        for fault in FAULTS:
            [cell] = [one for one in CELLS if (one.edge, one.fault) == (edge, fault)]
            shown = ["virtual time"] if cell.ends else []
            shown += [f"`{name.split('::')[0]}`" for name in dict.fromkeys(cell.tests)]
            lines.append(f"| {fault} | {cell.outcome} | {', '.join(dict.fromkeys(shown))} |")
        lines.append("")
    return "\n".join(lines)


def main() -> int:
    if PAGE.is_file() and PAGE.read_text("utf-8") == page():
        return 0
    if "--check" in sys.argv:
        print(f"{PAGE.name} is out of date; run `python -m tests.faults`")
        return 1
    PAGE.write_text(page(), "utf-8")
    print(f"{PAGE.name} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())

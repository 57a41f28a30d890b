"""A plan as a table, for terminals and for Markdown pages. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from epd.planning.memory import GIB, Row, Setting

if TYPE_CHECKING:
    from rich.table import Table

_NOTHING = "–"


def gib(nbytes: int) -> str:
    """Bytes as GiB, with as many digits as are worth reading."""
    size = nbytes / GIB
    if 0 < size < 0.01:
        return "<0.01"
    return f"{size:.2f}" if size < 10 else f"{size:.1f}"


def cells(row: Row) -> list[str]:
    """A row's sizes in GiB and its numbers, in the order of `_HEADINGS` after the first two; "–": does not apply."""
    fits, has_kv, has_other = row.free > 0, row.free > 0 and row.kv_left >= 0, row.other > 0
    return [
        gib(row.tower) if row.tower else _NOTHING,
        gib(row.language) if row.language else _NOTHING,
        gib(row.other) if has_other else _NOTHING,
        gib(row.weights),
        gib(row.peak) if fits else _NOTHING,
        gib(row.kv_left) if has_kv else _NOTHING,
        f"{row.kv_left_tokens:,}" if has_kv else _NOTHING,
        f"{row.kv_left_fraction:.0%}" if has_kv else _NOTHING,
        f"{row.patches:,}" if fits and row.patches >= 0 else _NOTHING,
        f"{row.requests:,}" if fits else _NOTHING,
        f"{row.images:,}" if fits else _NOTHING,
        row.limit,
    ]


# Two lines each.
_HEADINGS = (
    ("", "serving"),
    ("", "stage"),
    ("weights", "tower"),
    ("", "language"),
    ("", "other"),
    ("", "all"),
    ("peak of", "{} images"),
    ("KV left", "GiB"),
    ("", "tokens"),
    ("", "of free"),
    ("batch of", "patches"),
    ("", "requests"),
    ("most", "images"),
    ("limited", "by"),
)


def _stage(row: Row) -> str:
    return "all stages" if len(row.stages) == 3 else " + ".join(row.stages)


def markdown(rows: Sequence[Row], setting: Setting) -> str:
    """A Markdown table; sizes are in GiB."""
    names = [f"{first} {second}".strip().format(setting.num_images) for first, second in _HEADINGS]
    lines = [names, ["---", "---", *["--:"] * (len(names) - 3), "---"]]
    lines += [[row.layout, _stage(row), *cells(row)] for row in rows]
    dropped = [] if any(row.other for row in rows) else [_HEADINGS.index(("", "other"))]
    return "\n".join(
        f"| {' | '.join(cell for number, cell in enumerate(line) if number not in dropped)} |" for line in lines
    )


def table(rows: Sequence[Row], setting: Setting) -> Table:
    """A table for a terminal, each way of serving under a line with its name; sizes are in GiB."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    last = len(_HEADINGS) - 1
    shown = [number for number in range(1, last + 1) if _HEADINGS[number][1] != "other" or any(r.other for r in rows)]
    for number in shown:
        first, second = _HEADINGS[number]
        title = f"{first}\n{second}".format(setting.num_images)
        made.add_column(title, justify="left" if number in (1, last) else "right", no_wrap=True)
    for layout, group in groupby(rows, key=lambda row: row.layout):
        made.add_row(f"[bold]{layout}[/]")
        for row in group:
            texts = ["", f"  {_stage(row)}", *cells(row)]
            for name in ("GiB", "images"):
                number = next(n for n, heading in enumerate(_HEADINGS) if heading[1] == name)
                texts[number] = f"[cyan]{texts[number]}[/]"
            made.add_row(*(texts[number] for number in shown))
    return made

"""`epd cache ls`: draws the pools of a running pipeline, and how full they are, in the terminal.

Lives in the user's process. What is drawn comes from the endpoint's `GET /v1/cache`; `draw` is pure.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

FAILED = 1
# First letter of a state, as in the broker's cells -> how it is drawn with and without Unicode, and its colour.
_LOOKS: dict[str, tuple[str, str, str]] = {
    "p": ("█", "#", "green"),
    "r": ("▓", "+", "cyan"),
    "a": ("▒", "o", "yellow"),
    "q": ("×", "x", "red"),
    ".": ("·", ".", "bright_black"),
}
_STATES = {
    "p": ("pinned", "in use by requests or uploads"),
    "r": ("ready", "kept for the next request that has the same patch"),
    "a": ("allocated", "being encoded"),
    "q": ("quarantined", "a lost encode worker might still write there"),
    ".": ("free", ""),
}


def run(url: str) -> int:
    """Prints the pools of the pipeline behind `url`; returns the exit status."""
    from epd.client import AsyncClient, EPDError
    from epd.local.display import PatientConsole

    async def fetch() -> dict[str, Any]:
        async with AsyncClient(url, api_key=os.environ.get("EPD_API_KEY")) as client:
            return await client.cache()

    try:
        told = asyncio.run(fetch())
    except EPDError as error:
        print(f"epd cache ls: {error}", file=sys.stderr)
        return FAILED
    console = PatientConsole()
    unicode = (console.encoding or "").lower().startswith("utf")
    console.print(draw(told, min(console.width, 100), unicode=unicode))
    return 0


def draw(told: Mapping[str, Any], width: int, *, unicode: bool = True) -> RenderableType:
    """The pools as rows of cells, with a legend and the counts; legible without colour.

    Args:
        told: JSON of `GET /v1/cache`: `pools` (`epd.messages.PoolFill`) and `counters` (`epd.messages.Counters`).
        width: Columns of the terminal.
        unicode: Whether it can show block characters.
    """
    parts: list[RenderableType] = []
    for fill in told["pools"]:
        pool = fill["pool"]
        used = sum(fill["bytes_by_state"].values())
        parts.append(
            Text.assemble(
                (f"{pool['pool_id']}", "bold"),
                f"  {pool['kind']} on {pool['host']}: {_size(used)} of {_size(pool['nbytes'])}, "
                f"{fill['num_patches']} patches",
            )
        )
        parts += _rows(fill["cells"], width, unicode)
        parts.append(_legend(fill, unicode))
        parts.append(Text())
    if not told["pools"]:
        parts.append(Text("There is no pool: no cache daemon is registered."))
    parts.append(_counts(told["counters"]))
    return Group(*parts)


def _rows(cells: str, width: int, unicode: bool) -> Sequence[Text]:
    per_row = max(16, min(width - 2, 64))
    return [_row(cells[at : at + per_row], unicode) for at in range(0, len(cells), per_row)]


def _row(cells: str, unicode: bool) -> Text:
    row = Text("  ")
    for cell in cells:
        full, plain, colour = _LOOKS[cell]
        row.append(full if unicode else plain, colour)
    return row


def _legend(fill: Mapping[str, Any], unicode: bool) -> Table:
    table = Table.grid(padding=(0, 2))
    free = fill["pool"]["nbytes"] - sum(fill["bytes_by_state"].values())
    for letter, (state, meaning) in _STATES.items():
        nbytes = free if letter == "." else fill["bytes_by_state"].get(state, 0)
        full, plain, colour = _LOOKS[letter]
        mark = Text.assemble("  ", (full if unicode else plain, colour))
        table.add_row(mark, state, Text(_size(nbytes), justify="right"), Text(meaning, "dim"))
    return table


def _counts(counters: Mapping[str, Any]) -> Text:
    def number(name: str) -> float:
        return float(counters.get(name, 0))

    asked = number("num_encoded") + number("num_cache_hits") + number("num_coalesced")
    saved = number("num_cache_hits") + number("num_coalesced")
    share = f" ({saved / asked:.0%} of what was asked for)" if asked else ""
    return Text(
        f"patches: {number('num_encoded'):.0f} encoded, {number('num_cache_hits'):.0f} hits, "
        f"{number('num_coalesced'):.0f} coalesced{share}; {number('num_evicted'):.0f} evicted; "
        f"{number('encode_s_saved'):.1f} s of encoding saved"
    )


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024 or unit == "GiB":
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    raise AssertionError

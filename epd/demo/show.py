"""What the demo prints: the picture, who encoded which patch, the timeline, the figures.

Lives in the user's process; owns nothing: everything here turns values into what rich prints. Nothing depends on
colour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from epd.demo import timeline
from epd.local.display import colour_of

MAX_WIDTH = 110


@dataclass(frozen=True)
class Figures:
    """What the demo has measured; times in seconds, `idle_cpu` in shares of one core, medians if there are several."""

    ready_s: float
    imported_s: float
    num_processes: int
    first_s: float
    second_s: float
    idle_cpu: float
    pipeline_s: Sequence[float] = ()
    plain_s: Sequence[float] = ()


def colours(workers: Sequence[str]) -> dict[str, str]:
    """A colour for each worker."""
    return {worker: colour_of(index) for index, worker in enumerate(sorted({each for each in workers if each}))}


def question(characters: Sequence[str], truth: str, asked: str) -> RenderableType:
    """The picture in characters, and beside it what it shows."""
    grid = "\n".join(truth.split("\n"))
    left = Panel(Text("\n".join(characters)), title="the picture", title_align="left", expand=False, box=box.SQUARE)
    right = Panel(Text(grid), title="the truth", title_align="left", expand=False, box=box.SQUARE)
    return Group(Columns([left, right]), Text.assemble(("question: ", "dim"), asked))


def patches(
    by_worker: Mapping[str, str], numbers: Mapping[str, int], shape: tuple[int, int], palette: Mapping[str, str]
) -> RenderableType:
    """Which worker encoded which patch: as the picture's grid if that is what the patches are, else in order.

    Args:
        by_worker: Patch -> worker, from `timeline.encoded_by`.
        numbers: Patch -> its place in the request.
        shape: Rows and columns of tiles of the picture.
        palette: Worker -> colour.
    """
    cells = {number: by_worker.get(patch, "") for patch, number in numbers.items()}
    num_rows, num_columns = shape
    is_grid = len(cells) == num_rows * num_columns + 1
    if not is_grid:
        num_columns = 4
        num_rows = -(-len(cells) // num_columns)
    table = Table(box=box.SQUARE, show_header=False, show_lines=True, padding=(0, 1))
    for row in range(num_rows):
        table.add_row(*(_cell(row * num_columns + column, cells, palette) for column in range(num_columns)))
    if is_grid:
        last = num_rows * num_columns
        whole = Table(box=box.SQUARE, show_header=False, padding=(0, 1))
        whole.add_row(_cell(last, cells, palette))
        return Columns([table, Group(Text("and the whole, small:"), whole)])
    return table


def _cell(number: int, cells: Mapping[int, str], palette: Mapping[str, str]) -> Text:
    if number not in cells:
        return Text("")
    worker = cells[number]
    return Text.assemble((f"{number + 1}: ", "dim"), (worker or "from the cache", palette.get(worker, "dim")))


def story(rows: Sequence[timeline.Row], width: int, palette: Mapping[str, str], *, unicode: bool) -> RenderableType:
    """The timeline of a request."""
    text = Text(no_wrap=True, overflow="crop")
    for line in timeline.draw(rows, width, unicode=unicode):
        style = palette.get(line.worker, "")
        text.append(f"{line.label} ")
        text.append(line.bar, style)
        text.append(f" {line.figures}\n", "dim")
    work, wait = ("█", "░") if unicode else ("#", ".")
    text.append(f"{work} at work   {wait} waiting", "dim")
    return text


def figures(found: Figures) -> RenderableType:
    """The figures, one below the other."""
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right")

    def add(value: str, meaning: str) -> None:
        table.add_row(Text(value, "bold"), meaning)

    add(f"{found.ready_s:.1f} s", f"from start to ready, of which {found.imported_s:.1f} s importing vLLM, once")
    add(f"{found.first_s * 1e3:.0f} ms", "to the first token of the request above, the first it was asked")
    add(f"{found.second_s * 1e3:.0f} ms", "to the first token of the same request again, patches in the cache")
    add(f"{found.idle_cpu:.1%}", f"of one core for all {found.num_processes} processes together while idle")
    if found.pipeline_s:
        pipeline_s = median(found.pipeline_s)
        count = len(found.pipeline_s)
        add(f"{pipeline_s * 1e3:.0f} ms", f"to the first token, over HTTP, median of {count} pictures new to it")
        if found.plain_s:
            plain_s = median(found.plain_s)
            add(f"{plain_s * 1e3:.0f} ms", "the same for plain vLLM (`vllm serve`) beside it, in turns")
            add(
                f"{pipeline_s / plain_s:.1f}",
                "pipeline / plain vLLM; the model is tiny: these are overheads",
            )
    return table


def heading(console: Console, text: str) -> None:
    """Prints a heading."""
    console.print()
    console.print(Text(text, "bold"))


def median(values: Sequence[float]) -> float:
    """The middle value; the mean of the two middle ones if there are two."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2

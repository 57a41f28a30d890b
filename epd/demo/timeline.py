"""From a request's story to bars over time: pure, no terminal, no colour.

Lives in the user's process. The story is the `events` of `GET /v1/requests/{id}` (`epd.messages.StoryEvent` as JSON).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from epd.journal import SPANS, Happening

Event = Mapping[str, Any]

WAIT, WORK = "wait", "work"
_NAMES_A_PATCH = frozenset({Happening.CACHE_HIT, Happening.COALESCED, Happening.ENCODE})
_LABEL_WIDTH = 22
_RANGE_WIDTH = 17
_MARKS = {WAIT: ("░", "."), WORK: ("█", "#")}


@dataclass(frozen=True)
class Span:
    """Something that lasted from one moment to another, in seconds after the request was accepted."""

    start_s: float
    end_s: float
    kind: str = WORK


@dataclass(frozen=True)
class Row:
    """A line of the timeline: what happened at a worker ("" for the broker)."""

    label: str
    worker: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Line:
    """A row drawn: all parts have fixed widths."""

    label: str
    bar: str
    figures: str
    worker: str

    def __str__(self) -> str:
        """The whole line."""
        return f"{self.label} {self.bar} {self.figures}".rstrip()


def number_patches(*stories: Sequence[Event]) -> dict[str, int]:
    """Gives each patch its place in the request, from 0.

    The broker looks up patches in the order of the picture, so a story in which all were found in the cache shows that
    order; other stories show it by the order in which patches were handed out.

    Args:
        stories: Of requests with the same patches, the most reliable one first.
    """
    numbers: dict[str, int] = {}
    for events in stories:
        for event in events:
            if event["event"] in _NAMES_A_PATCH and (patch := event.get("patch")):
                numbers.setdefault(patch, len(numbers))
    return numbers


def encoded_by(events: Iterable[Event]) -> dict[str, str]:
    """Which worker encoded which patch."""
    return {event["patch"]: event["worker"] for event in events if event["event"] == Happening.ENCODED}


def rows(events: Sequence[Event], numbers: Mapping[str, int]) -> list[Row]:
    """The stages of one request as rows: the queue, each worker's patches, prefill, push, decode."""
    first: dict[str, Event] = {}
    for event in events:
        first.setdefault(event["event"], event)
    found = [_queue(first), *_encodes(events, numbers), _prefill(first), *_tokens(first)]
    return [row for row in found if row is not None]


def draw(found: Sequence[Row], width: int, *, unicode: bool = True) -> list[Line]:
    """Draws rows `width` characters wide, and below them the time axis.

    Args:
        found: From `rows`.
        width: At least 60.
        unicode: False for terminals that know ASCII only.
    """
    bar_width = max(20, width - _LABEL_WIDTH - _RANGE_WIDTH - 2)
    end_s = max((span.end_s for row in found for span in row.spans), default=0.0) or 1e-3
    lines = [_line(row, end_s, bar_width, unicode) for row in found]
    left, right = "0 ms", f"{end_s * 1e3:.0f} ms"
    axis = f"{left}{right:>{bar_width - len(left)}}"
    return [*lines, Line(" " * _LABEL_WIDTH, axis, " " * _RANGE_WIDTH, "")]


def _line(row: Row, end_s: float, bar_width: int, unicode: bool) -> Line:
    cells = [" "] * bar_width
    for span in sorted(row.spans, key=lambda span: span.kind == WORK):  # work covers waiting
        begin = min(bar_width - 1, int(span.start_s / end_s * bar_width))
        end = max(begin + 1, round(span.end_s / end_s * bar_width))
        mark = _MARKS[span.kind][0 if unicode else 1]
        cells[begin:end] = mark * (min(end, bar_width) - begin)
    work = [span for span in row.spans if span.kind == WORK] or list(row.spans)
    start_ms, end_ms = work[0].start_s * 1e3, work[-1].end_s * 1e3
    dash = "–" if unicode else "-"
    figures = f"{start_ms:.1f}{dash}{end_ms:.1f} ms"
    return Line(f"{row.label:<{_LABEL_WIDTH}.{_LABEL_WIDTH}}", "".join(cells), f"{figures:>{_RANGE_WIDTH}}", row.worker)


def _queue(first: Mapping[str, Event]) -> Row | None:
    if Happening.STARTED not in first:
        return None
    return Row("queue", "", (Span(0.0, first[Happening.STARTED]["at_s"], WAIT),))


def _encodes(events: Sequence[Event], numbers: Mapping[str, int]) -> list[Row]:
    given: dict[str, float] = {}
    found = []
    for event in events:
        patch = event.get("patch", "")
        if event["event"] == Happening.ENCODE:
            given[patch] = event["at_s"]
        elif event["event"] == SPANS[Happening.ENCODE]:
            end_s = event["at_s"]
            start_s = max(given.get(patch, 0.0), end_s - event.get("took_s", 0.0))
            label = f"{event['worker']}  patch {numbers.get(patch, 0) + 1}"
            spans = (Span(given.get(patch, start_s), start_s, WAIT), Span(start_s, end_s))
            found.append((event["worker"], numbers.get(patch, 0), Row(label, event["worker"], spans)))
    return [row for *_, row in sorted(found, key=lambda one: one[:2])]


def _prefill(first: Mapping[str, Event]) -> Row | None:
    event = first.get(SPANS[Happening.STARTED])
    if event is None:
        return None
    end_s = event["at_s"]
    start_s = max(0.0, end_s - event.get("took_s", 0.0))
    began_s = first.get(Happening.STARTED, {}).get("at_s", start_s)
    spans = (Span(min(began_s, start_s), start_s, WAIT), Span(start_s, end_s))
    return Row(f"{event.get('worker', '')}  prefill", event.get("worker", ""), spans)


def _push(first: Mapping[str, Event]) -> Row | None:
    if Happening.PREFILLED not in first or Happening.PUSHED not in first:
        return None
    worker = first[Happening.PUSHED].get("worker", "")
    start_s = first[Happening.PREFILLED]["at_s"]
    return Row(f"{worker}  push KV", worker, (Span(start_s, max(start_s, first[Happening.PUSHED]["at_s"])),))


def _tokens(first: Mapping[str, Event]) -> list[Row | None]:
    """The push and the tokens, in their order."""
    token = first.get(Happening.FIRST_TOKEN)
    if token is None:
        return [_push(first)]
    worker, token_s = token.get("worker", ""), token["at_s"]
    if Happening.DECODING not in first:  # decode has sampled it, from the KV that was pushed
        before_s = min(token_s, (first.get(Happening.PUSHED) or first.get(Happening.PREFILLED) or token)["at_s"])
        found = [_push(first), Row(f"{worker}  first token", worker, (Span(before_s, token_s),))]
        since_s = token_s
    else:
        found = [Row(f"{worker}  first token", worker, (Span(token_s, token_s),)), _push(first)]
        worker = first[Happening.DECODING].get("worker", "")
        since_s = min(
            (first.get(Happening.PUSHED) or first[Happening.DECODING])["at_s"], first[Happening.DECODING]["at_s"]
        )
    if Happening.FINISHED in first:
        found.append(Row(f"{worker}  last token", worker, (Span(since_s, first[Happening.FINISHED]["at_s"]),)))
    return found

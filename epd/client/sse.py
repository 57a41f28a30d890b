"""Server-Sent Events, as an incremental parser that does no I/O.

Follows the WHATWG HTML standard, section "Server-sent events": lines end in LF, CRLF or CR; lines
that begin with a colon are comments; the ``data`` lines of one event are joined by LF; an event that
the stream ends in the middle of is dropped. ``id`` and ``retry`` are skipped: a completion cannot be
resumed. Lives in the user's process.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["MAX_EVENT_BYTES", "Event", "EventParser", "EventTooLong"]

MAX_EVENT_BYTES = 16 * 1024 * 1024
_LINE_END = re.compile(rb"\r\n|\n|\r")
_BOM = b"\xef\xbb\xbf"


class EventTooLong(ValueError):
    """An event is longer than the parser is willing to hold."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event: its data, lines joined by LF, and its name."""

    data: str
    name: str = "message"


class EventParser:
    """Turns bytes, cut anywhere, into events.

    Args:
        max_event_bytes: The longest event that is held in memory.
    """

    def __init__(self, *, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self._max_event_bytes = max_event_bytes
        self._partial: list[bytes] = []  # the parts of a line whose end has not come
        self._held_bytes = 0  # in _partial and _data
        self._data: list[bytes] = []
        self._name = ""
        self._after_cr = False  # a CR ended the last part: a following LF belongs to it
        self._first_line = True

    def feed(self, piece: bytes) -> list[Event]:
        """Take the next bytes and return the events they complete.

        Raises:
            EventTooLong: An event exceeds ``max_event_bytes``.
        """
        if not piece:
            return []
        if self._after_cr and piece.startswith(b"\n"):
            piece = piece[1:]
        self._after_cr = piece.endswith(b"\r")
        *lines, rest = _LINE_END.split(piece)
        events = []
        for line in lines:
            if self._partial:
                line = b"".join([*self._partial, line])
                self._held_bytes -= sum(map(len, self._partial))
                self._partial.clear()
            event = self._take_line(line)
            if event is not None:
                events.append(event)
        if rest:
            self._partial.append(rest)
            self._hold(len(rest))
        return events

    def _take_line(self, line: bytes) -> Event | None:
        if self._first_line:
            self._first_line = False
            line = line.removeprefix(_BOM)
        if not line:
            return self._dispatch()
        key, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if key == b"data":
            self._data.append(value)
            self._hold(len(value))
        elif key == b"event":
            self._name = value.decode("utf-8", "replace")
        return None

    def _dispatch(self) -> Event | None:
        data, name = self._data, self._name
        self._data, self._name, self._held_bytes = [], "", 0
        if not data:
            return None
        return Event(b"\n".join(data).decode("utf-8", "replace"), name or "message")

    def _hold(self, num_bytes: int) -> None:
        self._held_bytes += num_bytes
        if self._held_bytes > self._max_event_bytes:
            raise EventTooLong(f"an event is longer than {self._max_event_bytes} bytes")

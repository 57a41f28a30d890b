from __future__ import annotations

import pytest

from epd.client.sse import Event, EventParser, EventTooLong

STREAM = (
    "\ufeff: a comment\r\n"
    'data: {"text": "é漢😀"}\r\n\r\n'
    "event: error\rdata: one\rdata:two\r\r"
    ":\n\n"
    "id: 3\nretry: 10\ndata\n\n"
    "data:  indented\nunknown: x\n\n"
    "data: never finished"
).encode()
EVENTS = [Event('{"text": "é漢😀"}'), Event("one\ntwo", "error"), Event(""), Event(" indented")]


def test_a_stream_in_one_piece_gives_its_events() -> None:
    assert EventParser().feed(STREAM) == EVENTS


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_the_size_of_the_pieces_does_not_matter(size: int) -> None:
    parser = EventParser()
    pieces = [STREAM[at : at + size] for at in range(0, len(STREAM), size)]
    assert [event for piece in pieces for event in parser.feed(piece)] == EVENTS


def test_a_cut_at_any_place_does_not_matter() -> None:
    for cut in range(len(STREAM) + 1):
        parser = EventParser()
        assert parser.feed(STREAM[:cut]) + parser.feed(b"") + parser.feed(STREAM[cut:]) == EVENTS, cut


def test_an_event_is_given_as_soon_as_its_empty_line_has_come() -> None:
    parser = EventParser()
    assert parser.feed(b"data: x\r\n\r") == [Event("x")]
    assert parser.feed(b"\n") == []
    assert parser.feed(b"data: y\n\n") == [Event("y")]


@pytest.mark.parametrize("stream", [b"data: " + b"x" * 200, b"data: xxxxxxxx\n" * 20])
def test_an_endless_event_is_refused(stream: bytes) -> None:
    parser = EventParser(max_event_bytes=100)
    with pytest.raises(EventTooLong, match="100 bytes"):
        for at in range(0, len(stream), 10):
            parser.feed(stream[at : at + 10])


def test_many_events_within_the_limit_pass() -> None:
    parser = EventParser(max_event_bytes=100)
    assert sum(len(parser.feed(b"data: 0123456789\n\n")) for _ in range(100)) == 100

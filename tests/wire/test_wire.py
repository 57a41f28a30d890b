"""Frames to messages and back: everything in the table survives, nothing else gets through."""

from __future__ import annotations

import contextlib

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from epd import messages as m
from epd.protocol import BY_STRUCT, PROTOCOL_VERSION, TABLE
from epd.transport import wire

EXAMPLES = {
    m.Submit: m.Submit(
        request_id="r",
        num_prompt_tokens=3,
        max_tokens=4,
        num_engine_frames=1,
        patches=[m.Patch(patch_hash="a", modality="image", num_tokens=2, num_frames=1)],
    ),
    m.Hello: m.Hello(name="e0", kind=m.Kind.WORKER, stage=m.Stage.ENCODE, incarnation="x", host="h", pid=1),
}


def test_every_message_of_the_union_has_exactly_one_row_in_the_table() -> None:
    assert set(m.Message.__args__) == {row.struct for row in TABLE}
    assert len({row.code for row in TABLE}) == len(TABLE) == len(BY_STRUCT)


def test_every_row_names_a_direction_and_its_docstring_opens_with_it() -> None:
    for row in TABLE:
        assert row.to_broker or row.from_broker, row.name
        opening = row.struct.__doc__.split(":")[0]
        assert "→" in opening, row.name
        assert opening.endswith("Broker") == (not row.from_broker), (row.name, opening)


def test_names_on_paper_are_in_capitals_with_underscores() -> None:
    assert BY_STRUCT[m.DropEncode].name == "DROP_ENCODE"
    assert BY_STRUCT[m.Submit].name == "SUBMIT"


@pytest.mark.parametrize("message", EXAMPLES.values(), ids=lambda one: type(one).__name__)
def test_a_message_survives_the_wire_with_its_frames(message: m.Message) -> None:
    assert wire.decode(wire.encode(message, [b"one", b""])) == (message, [b"one", b""])


PREFIX = bytes((PROTOCOL_VERSION, BY_STRUCT[m.Heartbeat].code))
HEADER = msgspec.msgpack.encode({})


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([], "0 frames"),
        ([PREFIX], "1 frames"),
        ([b"\x01", HEADER], "prefix of 1 bytes"),
        ([bytes((9, PREFIX[1])), HEADER], "protocol version 9"),
        ([bytes((PROTOCOL_VERSION, 255)), HEADER], "unknown command 255"),
        ([PREFIX, b"\xc1"], "HEARTBEAT"),
        ([PREFIX, msgspec.msgpack.encode({"num_steps": "many"})], "HEARTBEAT"),
        ([PREFIX, msgspec.msgpack.encode({"surprise": 1})], "unknown field"),
        ([PREFIX, b"\x80" + b"\0" * wire.MAX_HEADER_BYTES], "header of"),
        ([PREFIX, HEADER, *([b""] * wire.MAX_FRAMES)], "frames; at most"),
    ],
)
def test_frames_that_are_not_a_message_are_refused_with_a_reason(parts: list[bytes], reason: str) -> None:
    with pytest.raises(wire.WireError, match=reason):
        wire.decode(parts)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.binary(max_size=40), max_size=5))
def test_any_bytes_at_all_are_a_message_or_a_wire_error(parts: list[bytes]) -> None:
    with contextlib.suppress(wire.WireError):
        wire.decode(parts)


@settings(max_examples=300, deadline=None)
@given(code=st.sampled_from([row.code for row in TABLE]), header=st.binary(max_size=60))
def test_any_header_under_any_command_is_a_message_or_a_wire_error(code: int, header: bytes) -> None:
    with contextlib.suppress(wire.WireError):
        wire.decode([bytes((PROTOCOL_VERSION, code)), header])

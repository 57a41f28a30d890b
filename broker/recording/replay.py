"""Replays what a flight recorder has written: gives the same events, at the same times, to a core of its own.

Pure but for the file it reads. The same events always lead to the same decisions, so a replay shows what a broker did
and why, after it is gone. If it differs from what was sent then, this is another version, or a bug.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections import Counter
from collections.abc import Iterator
from typing import Any, BinaryIO

import msgpack
import msgspec

from broker.core.core import Core
from broker.core.outbox import Send
from broker.recording.recorder import FORMAT, HEAD_FIELDS, digest
from epd import messages as m
from epd.config import BrokerConfig
from epd.transport import wire
from epd.transport.wire import MAX_HEADER_BYTES

_MAX_RECORD_BYTES = 4 * MAX_HEADER_BYTES


class RecordingError(ValueError):
    """A file that is not a recording, or one of another version."""


@dataclasses.dataclass
class Replayed:
    """What came of a replay.

    `first_difference` is the number of the first event (from 1) after which the core sent something else than it did
    then, 0 if there is none; `failures` are the codes of FAILED messages; `errors` what the core raised. `core` is as
    it was at the end of the recording.
    """

    version: str
    began: str
    core: Core
    num_messages: int = 0
    num_ticks: int = 0
    seconds: float = 0.0
    first_difference: int = 0
    failures: Counter[str] = dataclasses.field(default_factory=Counter)
    errors: list[str] = dataclasses.field(default_factory=list)

    @property
    def num_events(self) -> int:
        """Messages and ticks."""
        return self.num_messages + self.num_ticks


def replay(file: BinaryIO) -> Replayed:
    """Replays a whole recording; one that ends in the middle of an event, as after a crash, up to there.

    Raises:
        RecordingError: it is not a recording, or this version cannot replay it.
    """
    records = _records(file)
    done = _begin(next(records, None))
    began_at: float | None = None
    for record in records:
        try:
            now, *what, expected = record
            began_at = now if began_at is None else began_at
            sends = _again(done, now, what)
        except (TypeError, ValueError) as error:
            raise RecordingError(f"event {done.num_events + 1} is not valid: {error}") from None
        done.seconds = now - began_at
        done.failures.update(str(send.message.code) for send in sends if isinstance(send.message, m.Failed))
        if not done.first_difference and digest(sends) != expected:
            done.first_difference = done.num_events
    return done


def _records(file: BinaryIO) -> Iterator[Any]:
    unpacker = msgpack.Unpacker(file, max_buffer_size=_MAX_RECORD_BYTES)
    try:
        yield from unpacker
    except (msgpack.UnpackException, ValueError) as error:
        raise RecordingError(f"not MessagePack at byte {unpacker.tell()}: {error}") from None


def _begin(head: Any) -> Replayed:
    if not isinstance(head, dict) or "format" not in head or "version" not in head:
        raise RecordingError("it does not begin like a recording")
    if head["format"] != FORMAT or tuple(head) != HEAD_FIELDS:
        text = (
            f"recorded by EPD {head['version']} in format {head['format']}; this version replays format {FORMAT} only"
        )
        raise RecordingError(text)
    try:
        config = msgspec.convert(head["config"], BrokerConfig)
    except msgspec.ValidationError as error:
        raise RecordingError(f"recorded by EPD {head['version']}, with other settings: {error}") from None
    return Replayed(head["version"], head["began"], Core(config, head["first_generation"], head["epoch_s"]))


def _again(done: Replayed, now: float, what: list[Any]) -> list[Send]:
    if len(what) == 1:
        done.num_ticks += 1
        done.core.status_board.process_held = what[0]
        return done.core.tick(now)
    done.num_messages += 1
    peer_id, prefix, header, sizes = what
    message, frames = wire.decode([prefix, header, *(bytes(size) for size in sizes)])
    try:
        return done.core.handle(peer_id, message, frames, now)
    except Exception:  # as the daemon does
        done.errors.append(f"event {done.num_events}: {traceback.format_exc()}")
        return done.core.take()

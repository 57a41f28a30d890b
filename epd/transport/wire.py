"""Frames to messages and back, for every socket of EPD; pure, no sockets.

A message is a list of frames: prefix (protocol version, command), MessagePack header, opaque frames. Everything is
bounded, and whatever does not fit raises `WireError` with a reason: a malformed message costs its sender only.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from epd.messages import Message
from epd.protocol import BY_CODE, BY_STRUCT, PROTOCOL_VERSION

MAX_HEADER_BYTES = 4 << 20
MAX_FRAMES = 16_384
MAX_MESSAGE_BYTES = 1 << 30

_encoder = msgspec.msgpack.Encoder()
_decoders = {row.code: msgspec.msgpack.Decoder(row.struct) for row in BY_CODE.values()}

Frames = Sequence[bytes]


class WireError(ValueError):
    """A list of frames that is not an EPD message; the text says why and never quotes the content."""


def encode(message: Message, frames: Frames = ()) -> list[bytes]:
    """Returns the frames to send for `message` followed by its opaque `frames`."""
    prefix = bytes((PROTOCOL_VERSION, BY_STRUCT[type(message)].code))
    return [prefix, _encoder.encode(message), *frames]


def decode(parts: Frames) -> tuple[Message, list[bytes]]:
    """Returns the message and its opaque frames.

    Raises:
        WireError: unknown version or command, a bound exceeded, or a header that does not fit its struct.
    """
    if len(parts) < 2:
        raise WireError(f"{len(parts)} frames; a message has at least 2")
    if len(parts) > MAX_FRAMES:
        raise WireError(f"{len(parts)} frames; at most {MAX_FRAMES}")
    prefix, header, frames = parts[0], parts[1], list(parts[2:])
    if len(prefix) != 2:
        raise WireError(f"prefix of {len(prefix)} bytes; it has 2")
    if prefix[0] != PROTOCOL_VERSION:
        raise WireError(f"protocol version {prefix[0]}; this is version {PROTOCOL_VERSION}")
    decoder = _decoders.get(prefix[1])
    if decoder is None:
        raise WireError(f"unknown command {prefix[1]}")
    if len(header) > MAX_HEADER_BYTES:
        raise WireError(f"header of {len(header)} bytes; at most {MAX_HEADER_BYTES}")
    if (total := sum(map(len, frames))) > MAX_MESSAGE_BYTES:
        raise WireError(f"{total} bytes of opaque frames; at most {MAX_MESSAGE_BYTES}")
    try:
        return decoder.decode(header), frames
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise WireError(f"{BY_CODE[prefix[1]].name}: {error}") from None

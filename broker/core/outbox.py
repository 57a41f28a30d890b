"""What the core is about to send, and how many bytes of opaque frames it holds. Pure; a part of the decision core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from epd.messages import Message, Outputs, RequestOutput

_NONE: list[bytes] = []


class Send(NamedTuple):
    """Something to do: send this message with these opaque frames to that peer."""

    peer_id: str
    message: Message
    frames: Sequence[bytes]


class Outbox:
    """The messages to send, in order; consecutive outputs for one endpoint go in one message."""

    def __init__(self) -> None:
        self._out: list[Send] = []
        self._endpoint = ""
        self._outputs: list[RequestOutput] = []
        self._frames: list[bytes] = []

    def send(self, peer_id: str, message: Message, frames: Sequence[bytes] = _NONE) -> None:
        """Adds a message to those to send."""
        if self._outputs:
            self._close()
        self._out.append(Send(peer_id, message, frames))

    def output(self, endpoint: str, output: RequestOutput, frames: Sequence[bytes] = _NONE) -> None:
        """Adds a request's output, in one message with those just before it for the same endpoint."""
        if self._outputs and self._endpoint != endpoint:
            self._close()
        self._endpoint = endpoint
        self._outputs.append(output)
        if frames:
            self._frames += frames

    def take(self) -> list[Send]:
        """The messages to send; there are none left afterwards."""
        if self._outputs:
            self._close()
        out, self._out = self._out, []
        return out

    def _close(self) -> None:
        self._out.append(Send(self._endpoint, Outputs(outputs=self._outputs), self._frames))
        self._outputs, self._frames = [], []


class FrameLedger:
    """How many bytes of opaque frames are held for requests and uploads, of at most `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self.held_bytes = 0

    def has_room(self, num_bytes: int) -> bool:
        """Whether that many more bytes may be held."""
        return self.held_bytes + num_bytes <= self._max_bytes

    def hold(self, num_bytes: int) -> None:
        """That many more bytes are held."""
        self.held_bytes += num_bytes

    def let_go(self, num_bytes: int) -> None:
        """That many bytes are no longer held."""
        self.held_bytes -= num_bytes

"""A ZeroMQ socket on an asyncio loop, without a task or a future per message.

Lives in every process; owns the socket it is given. The loop watches the socket's file descriptor, which ZeroMQ signals
only at the edge: whenever it fires, and after every send, all messages that wait are read. Reading happens in one
place, on the loop, in batches, and never blocks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import zmq

from epd.transport.wire import MAX_FRAMES

MAX_BATCH = 256
# Smaller frames are copied out of ZeroMQ's memory, which is cheaper than keeping them there.
LARGE_BYTES = 16 << 10
# Plain numbers: combining flags of ZeroMQ's enumerations costs as much as a small frame.
_LAST, _MORE = int(zmq.NOBLOCK), int(zmq.NOBLOCK) | int(zmq.SNDMORE)

OnParts = Callable[[list[bytes]], None]


class MessageSocket:
    """Calls `on_parts` with each multipart message, on the running loop, until closed.

    Args:
        sock: a socket of `epd.transport.factory`; its high-water marks bound what waits inside ZeroMQ.
        on_parts: must not raise; it is on the path of every message.
        num_read: how many frames of each message are read; the others are only passed on or dropped. Large ones of
            these are `zmq.Frame`s in ZeroMQ's own memory, which have a length and can be sent without a copy.
    """

    def __init__(self, sock: zmq.Socket[bytes], on_parts: OnParts, num_read: int | None = None) -> None:
        self._sock, self._on_parts = sock, on_parts
        self._num_read = MAX_FRAMES + 1 if num_read is None else num_read
        self._loop = asyncio.get_running_loop()
        self._fd = sock.fileno()
        self._again: asyncio.Handle | None = None
        self._loop.add_reader(self._fd, self._read)
        self._soon()

    @property
    def closed(self) -> bool:
        """Whether `close` has been called."""
        return bool(self._sock.closed)

    def send(self, parts: Sequence[bytes]) -> None:
        """Hands a message to ZeroMQ.

        Raises:
            zmq.Again: the high-water mark is reached.
            zmq.ZMQError: it cannot be sent; a ROUTER raises EHOSTUNREACH for a peer that is gone.
        """
        *first, last = parts
        send = self._sock.send
        try:
            for part in first:
                send(part, _MORE)
            send(last, _LAST)
        finally:
            self._soon()  # sending may have swallowed the edge that announces a message

    def close(self) -> None:
        """Stops reading; sent messages have the socket's linger to leave."""
        if self.closed:
            return
        self._loop.remove_reader(self._fd)
        if self._again:
            self._again.cancel()
        self._sock.close()

    def _soon(self) -> None:
        if self._again is None:
            self._again = self._loop.call_soon(self._read)

    def _receive(self) -> list[bytes]:
        """The frames of the next message; raises `zmq.Again` if there is none."""
        receive = self._sock.recv
        frame = receive(_LAST, copy=False)
        parts = [frame.bytes]
        while frame.more:
            frame = receive(copy=False)
            is_kept = len(parts) >= self._num_read and len(frame) >= LARGE_BYTES
            parts.append(frame if is_kept else frame.bytes)  # type: ignore[arg-type]
        return parts

    def _read(self) -> None:
        if self._again:
            self._again.cancel()
            self._again = None
        for _ in range(MAX_BATCH):
            try:
                parts = self._receive()
            except zmq.Again:
                return
            self._on_parts(parts)
            if self.closed:
                return
        self._soon()

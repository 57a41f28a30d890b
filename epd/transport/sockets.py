"""A ZeroMQ socket on an asyncio loop, without a task or a future per message.

Lives in every process; owns the socket it is given. The loop watches the socket's file descriptor, which ZeroMQ signals
only at the edge: whenever it fires, and after every send, all messages that wait are read. Reading happens in one
place, on the loop, in batches, and never blocks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import zmq

MAX_BATCH = 256

OnParts = Callable[[list[bytes]], None]


class MessageSocket:
    """Calls `on_parts` with each multipart message, on the running loop, until it is closed.

    Args:
        sock: a socket of `epd.transport.factory`; its high-water marks bound what waits inside ZeroMQ.
        on_parts: must not raise; what it does is on the path of every message.
    """

    def __init__(self, sock: zmq.Socket[bytes], on_parts: OnParts) -> None:
        self._sock, self._on_parts = sock, on_parts
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
        try:
            self._sock.send_multipart(parts, zmq.NOBLOCK)
        finally:
            self._soon()  # sending may have swallowed the edge that announces a message

    def close(self) -> None:
        """Stops reading; what was sent has the socket's linger to leave."""
        if self.closed:
            return
        self._loop.remove_reader(self._fd)
        if self._again:
            self._again.cancel()
        self._sock.close()

    def _soon(self) -> None:
        if self._again is None:
            self._again = self._loop.call_soon(self._read)

    def _read(self) -> None:
        if self._again:
            self._again.cancel()
            self._again = None
        for _ in range(MAX_BATCH):
            try:
                parts = self._sock.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._on_parts(parts)
            if self.closed:
                return
        self._soon()

"""Makes every ZeroMQ socket of EPD, with all its options. `tests/wire/test_factory.py` finds sockets made elsewhere.

Lives in every process; whoever makes a factory owns it and the sockets that it has made.

This is the place for encryption and identity, which EPD does not have yet. CURVE keys are options of a socket that must
be set before it binds or connects, so they belong in `SocketFactory._new`: the server's key pair where it binds, the
client's and the server's public key where it connects. A peer's proven identity is then a property of each message that
a ROUTER receives (`User-Id`), to be checked where the broker reads HELLO; a routing id proves nothing.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

import zmq

from epd.config import ConfigError
from epd.transport import wire

UNBOUNDED = 0
LINGER_MS = 200  # for the last words of a peer that leaves
# A host that vanishes without a word is noticed after IDLE + COUNT * INTERVAL if nothing is sent to it, else after
# UNACKNOWLEDGED. The kernel does this, so a process that is stopped or busy is not taken for gone.
_KEEPALIVE_IDLE_S, _KEEPALIVE_INTERVAL_S, _KEEPALIVE_COUNT = 30, 10, 3
_UNACKNOWLEDGED_MS = 60_000


class AddressError(ConfigError):
    """Nobody can listen at this address."""


class SocketFactory:
    """Makes sockets on its own ZeroMQ context. Also a context manager; `close` ends all that it has made.

    No frame of any of its sockets may have more than `wire.MAX_MESSAGE_BYTES`.
    """

    def __init__(self) -> None:
        self._context = zmq.Context()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes all sockets; returns when what they have sent has left, or after their linger."""
        self._context.destroy()

    def bind_router(self, address: str, *, max_waiting: int) -> zmq.Socket[bytes]:
        """A ROUTER that listens; sending to a peer that is gone raises `zmq.ZMQError` (EHOSTUNREACH).

        Args:
            address: where; a TCP port of 0 or `*` picks a free one, see `address_of`.
            max_waiting: how many messages may wait for one peer, and from one; `UNBOUNDED` for any number.

        Raises:
            AddressError: it cannot listen there.
        """
        sock = self._new(zmq.ROUTER, max_sent=max_waiting, max_received=max_waiting)
        sock.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            sock.bind(address)
        except zmq.ZMQError as error:
            sock.close()
            raise AddressError(f"cannot listen on {address}: {error.strerror or error}") from None
        return sock

    def connect_dealer(
        self,
        address: str,
        *,
        routing_id: bytes = b"",
        max_sent: int,
        max_received: int = UNBOUNDED,
        linger_ms: int = LINGER_MS,
    ) -> zmq.Socket[bytes]:
        """A DEALER that connects, now or once somebody listens there.

        Args:
            address: where.
            routing_id: its name for the ROUTER there, which makes one up if there is none.
            max_sent: how many messages may wait to leave; one more raises `zmq.Again`.
            max_received: how many may wait to be read.
            linger_ms: how long messages may still leave after `close`.

        Raises:
            zmq.ZMQError: that is not an address.
        """
        sock = self._new(zmq.DEALER, max_sent=max_sent, max_received=max_received, linger_ms=linger_ms)
        if routing_id:
            sock.setsockopt(zmq.IDENTITY, routing_id)
        try:
            sock.connect(address)
        except zmq.ZMQError:
            sock.close()
            raise
        return sock

    def connect_request(self, address: str, *, timeout_s: float) -> zmq.Socket[bytes]:
        """A REQ for one question to somebody else's socket; receiving raises `zmq.Again` after `timeout_s`."""
        sock = self._new(zmq.REQ, max_sent=1, max_received=1, linger_ms=0)
        sock.setsockopt(zmq.RCVTIMEO, int(timeout_s * 1000))
        sock.connect(address)
        return sock

    def _new(self, kind: int, *, max_sent: int, max_received: int, linger_ms: int = LINGER_MS) -> zmq.Socket[bytes]:
        sock = self._context.socket(kind)
        sock.setsockopt(zmq.LINGER, linger_ms)
        sock.setsockopt(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
        sock.setsockopt(zmq.SNDHWM, max_sent)
        sock.setsockopt(zmq.RCVHWM, max_received)
        sock.setsockopt(zmq.TCP_KEEPALIVE, 1)
        sock.setsockopt(zmq.TCP_KEEPALIVE_IDLE, _KEEPALIVE_IDLE_S)
        sock.setsockopt(zmq.TCP_KEEPALIVE_INTVL, _KEEPALIVE_INTERVAL_S)
        sock.setsockopt(zmq.TCP_KEEPALIVE_CNT, _KEEPALIVE_COUNT)
        sock.setsockopt(zmq.TCP_MAXRT, _UNACKNOWLEDGED_MS)
        return sock


def address_of(sock: zmq.Socket[bytes]) -> str:
    """Where a bound socket listens."""
    return sock.getsockopt_string(zmq.LAST_ENDPOINT)

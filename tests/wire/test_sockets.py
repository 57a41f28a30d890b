"""Messages through `MessageSocket`, with frames that are only passed on."""

from __future__ import annotations

import asyncio

import zmq

from epd.transport.factory import UNBOUNDED, SocketFactory, address_of
from epd.transport.sockets import LARGE_BYTES, MessageSocket


async def test_large_frames_that_nobody_reads_are_passed_on_as_they_came() -> None:
    with SocketFactory() as sockets:
        router = sockets.bind_router("tcp://127.0.0.1:*", max_waiting=UNBOUNDED)
        dealer = sockets.connect_dealer(address_of(router), routing_id=b"me", max_sent=UNBOUNDED)
        got: list[list[bytes]] = []
        back: list[list[bytes]] = []
        read = asyncio.Event()
        passing = MessageSocket(router, lambda parts: (got.append(parts), passing.send(parts)), num_read=3)
        reading = MessageSocket(dealer, lambda parts: (back.append(parts), read.set()))
        message = [b"prefix", b"h" * LARGE_BYTES, b"small", b"x" * LARGE_BYTES, b"", b"y" * (1 << 20)]
        reading.send(message)
        async with asyncio.timeout(10):
            await read.wait()
        assert back == [message]
        assert [type(part) for part in got[0]] == [bytes, bytes, bytes, bytes, zmq.Frame, bytes, zmq.Frame]
        assert [len(part) for part in got[0][1:]] == [len(part) for part in message]
        passing.close()
        reading.close()

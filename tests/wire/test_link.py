"""The link and the broker daemon over real sockets."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator

import pytest
import zmq
import zmq.asyncio

from broker.daemon import Broker
from epd import messages as m
from epd.config import BrokerConfig, Config
from epd.transport import wire
from epd.transport.link import BrokerLink

FAST = BrokerConfig(address="tcp://127.0.0.1:0", heartbeat_s=0.05, lost_after_s=0.6)


class Heard:
    """What one peer has been told, and when it was registered or lost."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[m.Message] = asyncio.Queue()
        self.welcomes: asyncio.Queue[m.Welcome] = asyncio.Queue()
        self.losses: asyncio.Queue[str] = asyncio.Queue()

    def link(self, address: str, name: str, role: m.Kind | m.Stage) -> BrokerLink:
        async def registered(welcome: m.Welcome) -> None:
            self.welcomes.put_nowait(welcome)

        async def lost(reason: str) -> None:
            self.losses.put_nowait(reason)

        return BrokerLink(
            address,
            name,
            m.Kind.WORKER if isinstance(role, m.Stage) else role,
            stage=lambda: role if isinstance(role, m.Stage) else None,
            on_message=lambda message, frames: self.messages.put_nowait(message),
            on_registered=registered,
            on_lost=lost,
        )

    async def next(self, kind: type) -> m.Message:
        while True:
            message = await asyncio.wait_for(self.messages.get(), 5)
            if isinstance(message, kind):
                return message


@pytest.fixture
async def broker() -> AsyncIterator[Broker]:
    broker = Broker(Config(broker=FAST))
    serving = asyncio.create_task(broker.serve())
    yield broker
    serving.cancel()
    await asyncio.gather(serving, return_exceptions=True)
    broker.close()


async def test_a_peer_is_registered_kept_alive_and_leaves_with_goodbye(broker: Broker) -> None:
    heard = Heard()
    async with heard.link(broker.address, "e0", m.Stage.ENCODE) as link:
        await asyncio.wait_for(link.wait_registered(), 5)
        await asyncio.sleep(2 * FAST.lost_after_s)
        assert [peer.name for peer in broker.core.registry] == ["e0"]
        link.goodbye("done")
        await asyncio.sleep(0.1)
        assert not list(broker.core.registry)
    assert heard.losses.empty()


async def test_an_endpoint_hears_of_every_worker_that_comes(broker: Broker) -> None:
    endpoint, worker = Heard(), Heard()
    async with endpoint.link(broker.address, "ep", m.Kind.ENDPOINT):
        await endpoint.next(m.Status)
        async with worker.link(broker.address, "d0", m.Stage.DECODE):
            while not (await endpoint.next(m.Status)).workers:
                pass


async def test_a_peer_registers_again_under_a_new_incarnation_when_the_broker_has_forgotten_it(broker: Broker) -> None:
    heard = Heard()
    async with heard.link(broker.address, "d0", m.Stage.DECODE) as link:
        await asyncio.wait_for(link.wait_registered(), 5)
        first = link.incarnation
        broker.core.registry.remove(broker.core.registry.get(first))
        assert "does not know" in await asyncio.wait_for(heard.losses.get(), 5)
        await asyncio.wait_for(link.wait_registered(), 5)
        assert link.incarnation != first


async def test_a_peer_notices_that_the_broker_is_gone_and_finds_the_next_one() -> None:
    broker = Broker(Config(broker=FAST))
    serving = asyncio.create_task(broker.serve())
    heard = Heard()
    async with heard.link(broker.address, "d0", m.Stage.DECODE) as link:
        await asyncio.wait_for(link.wait_registered(), 5)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        broker.close()
        assert "silent" in await asyncio.wait_for(heard.losses.get(), 5)
        config = BrokerConfig(address=broker.address, heartbeat_s=0.05, lost_after_s=0.6)
        again = Broker(Config(broker=config))
        serving = asyncio.create_task(again.serve())
        await asyncio.wait_for(link.wait_registered(), 5)
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        again.close()


async def test_a_peer_that_falls_silent_is_lost_and_told_so_when_it_speaks_again(broker: Broker) -> None:
    context = zmq.asyncio.Context()
    sock = context.socket(zmq.DEALER)
    sock.setsockopt(zmq.IDENTITY, b"silent")
    sock.connect(broker.address)
    hello = m.Hello(name="d0", kind=m.Kind.WORKER, stage=m.Stage.DECODE, incarnation="silent", host="h", pid=1)
    await sock.send_multipart(wire.encode(hello))
    assert isinstance(wire.decode(await sock.recv_multipart())[0], m.Welcome)
    await asyncio.sleep(FAST.lost_after_s + 0.6)
    assert not list(broker.core.registry)
    await sock.send_multipart(wire.encode(m.Heartbeat()))
    message = m.HeartbeatAck()
    while not isinstance(message, m.Unknown):
        message, _ = wire.decode(await asyncio.wait_for(sock.recv_multipart(), 5))
    context.destroy(linger=0)


async def test_garbage_from_one_peer_costs_the_others_nothing(broker: Broker) -> None:
    heard = Heard()
    async with heard.link(broker.address, "d0", m.Stage.DECODE) as link:
        await asyncio.wait_for(link.wait_registered(), 5)
        context = zmq.asyncio.Context()
        sock = context.socket(zmq.DEALER)
        sock.connect(broker.address)
        for _ in range(500):
            await sock.send_multipart([secrets.token_bytes(secrets.randbelow(30)) for _ in range(3)])
        await sock.send_multipart(wire.encode(m.Heartbeat()))
        message, _ = wire.decode(await asyncio.wait_for(sock.recv_multipart(), 5))
        assert isinstance(message, m.Unknown), "the broker has read all of it and still answers"
        assert broker.num_malformed > 400
        assert link.registered
        assert [peer.name for peer in broker.core.registry] == ["d0"]
        context.destroy(linger=0)
    assert heard.losses.empty()

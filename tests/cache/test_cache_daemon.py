"""The cache daemon against a real ROUTER that plays the broker."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from cache import daemon, pools
from cache.pools.shared_memory import DIRECTORY, PREFIX
from epd import config as configs
from epd.messages import Goodbye, Heartbeat, HeartbeatAck, Hello, Kind, Pools, Unknown, Welcome
from epd.process.lifecycle import Life
from epd.transport import wire

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 20.0


class Broker:
    """Answers by hand: receives a message and remembers who sent it."""

    def __init__(self, context):
        self.sock = context.socket(zmq.ROUTER)
        self.sock.setsockopt(zmq.LINGER, 0)
        self.address = f"tcp://127.0.0.1:{self.sock.bind_to_random_port('tcp://127.0.0.1')}"
        self.peer = b""

    async def expect(self, kind):
        """The next message of `kind`; heartbeats are answered, repeated HELLOs skipped."""
        while True:
            self.peer, *parts = await self.sock.recv_multipart()
            message, _ = wire.decode(parts)
            if isinstance(message, kind):
                return message
            assert isinstance(message, Heartbeat | Hello), message
            if isinstance(message, Heartbeat):
                await self.send(HeartbeatAck())

    async def send(self, message):
        await self.sock.send_multipart([self.peer, *wire.encode(message)])

    async def welcome(self):
        hello = await self.expect(Hello)
        await self.send(Welcome(heartbeat_s=0.05, lost_after_s=5.0))
        await self.expect(Heartbeat)
        return hello


@pytest.fixture
async def broker():
    context = zmq.asyncio.Context()
    yield Broker(context)
    context.destroy(linger=0)


def exists(pool):
    return Path(pool.name).exists()


def config(broker, **cache):
    made = configs.Config()
    made.broker.address = broker.address
    made.cache = configs.CacheConfig(**{"pool_bytes": 1 << 20, **cache})
    return made


@contextlib.asynccontextmanager
async def running(settings):
    """The daemon as a task; yields its stop event and the task."""
    stop = asyncio.Event()
    task = asyncio.create_task(daemon.main(settings, "cache-0", Life(stop)))
    try:
        async with asyncio.timeout(WAIT_S):
            yield stop, task
    finally:
        stop.set()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_cache_registers_its_pool_and_takes_it_away_when_it_says_goodbye(broker):
    async with running(config(broker)) as (stop, task):
        hello = await broker.welcome()
        assert (hello.name, hello.kind, hello.pid) == ("cache-0", Kind.CACHE, os.getpid())
        [pool] = hello.pools
        assert (pool.kind, pool.nbytes, pool.checksum) == ("shared_memory", 1 << 20, True)
        assert pool.name == str(DIRECTORY / (PREFIX + pool.pool_id))
        view = pools.open_view(pool)
        stop.set()
        assert (await broker.expect(Goodbye)).reason == "stopped"
        assert await task == 0
        assert not exists(pool)
        view.close()


async def test_a_lost_broker_costs_nothing_and_the_same_pool_is_registered_again(broker):
    async with running(config(broker, checksum=False)) as (_, task):
        first = await broker.welcome()
        await broker.send(Unknown())
        while (second := await broker.expect(Hello)).incarnation == first.incarnation:
            pass
        assert second.pools == first.pools and not second.pools[0].checksum
        assert exists(second.pools[0]) and not task.done()


async def test_a_message_that_is_not_for_a_cache_is_ignored(broker):
    async with running(config(broker)) as (stop, task):
        await broker.welcome()
        await broker.send(Pools(pools=[]))
        await broker.expect(Heartbeat)
        stop.set()
        await broker.expect(Goodbye)
        assert await task == 0


async def test_systemd_is_told_once_the_pool_is_registered_and_when_it_stops(broker, tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind(str(tmp_path / "notify"))
        notified.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        async with running(config(broker)) as (stop, task):
            await broker.expect(Hello)
            with pytest.raises(BlockingIOError):
                notified.recv(100)
            await broker.welcome()
            assert notified.recv(100) == b"READY=1"
            stop.set()
            await task
            assert notified.recv(100) == b"STOPPING=1"


async def test_it_stops_at_once_when_there_is_no_broker(broker):
    broker.sock.close()
    async with running(config(broker)) as (stop, task):
        stop.set()
        assert await task == 0


@pytest.mark.parametrize("cache", [{"kind": "cuda_ipc"}, {"pool_bytes": 1 << 50}, {"pool_bytes": 0}])
async def test_a_pool_that_cannot_be_made_ends_the_daemon_with_status_1(broker, cache):
    assert await daemon.main(config(broker, **cache), "cache-0", Life()) == 1


async def test_a_killed_daemon_is_cleaned_up_after_by_the_next_one_which_has_a_new_pool(broker):
    code = (
        "import sys; from cache.daemon import run; from epd.config import parse; sys.exit(run(parse(sys.argv[1]), 'c'))"
    )
    found = []
    async with asyncio.timeout(WAIT_S):
        for end in (signal.SIGKILL, signal.SIGTERM):
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", code, configs.dump(config(broker)), cwd=ROOT, stderr=asyncio.subprocess.DEVNULL
            )
            try:
                found += (await broker.welcome()).pools
                assert [exists(pool) for pool in found] in ([True], [False, True])
            finally:
                process.send_signal(end)
            status = await process.wait()
    assert status == 0
    assert found[0].pool_id != found[1].pool_id
    assert not exists(found[1])

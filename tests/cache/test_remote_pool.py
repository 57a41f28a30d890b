"""Pools of other hosts: a real server on an event loop, and views that wait for it in the test's thread."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Iterator

import msgspec
import pytest
import zmq

from cache import pools
from cache.pools import PoolError, SharedMemoryPool, SharedMemoryView
from cache.pools.remote import AWAY_S, RemoteView, SlotServer
from cache.slot import StaleSlotError, slot_bytes
from epd import hosts
from epd.messages import Pool, Slot

NBYTES = slot_bytes(3, 8, "float32")
DATA = bytes(range(96))


class Served:
    """A pool of a host called "far", and its server."""

    def __init__(self) -> None:
        self.owner = SharedMemoryPool(secrets.token_hex(4), 1 << 16, True)
        self.local = SharedMemoryView(self.owner.descriptor())
        self.pool = msgspec.structs.replace(self.owner.descriptor(), host="far")
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.server: SlotServer | None = None
        self.serve("tcp://127.0.0.1:*")

    def serve(self, address: str) -> None:
        async def start() -> SlotServer:
            return SlotServer(address, self.pool, self.local.memory)

        self.server = asyncio.run_coroutine_threadsafe(start(), self.loop).result(5)
        self.pool = msgspec.structs.replace(self.pool, address=self.server.address)

    def stop(self) -> None:
        async def stop() -> None:
            assert self.server
            self.server.close()

        if self.server:
            asyncio.run_coroutine_threadsafe(stop(), self.loop).result(5)
        self.server = None

    def close(self) -> None:
        self.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)
        self.loop.close()
        self.local.close()
        self.owner.close()

    def slot(self, number: int = 0, generation: int = 7, owner: str = "encoder") -> Slot:
        return Slot(
            pool_id=self.pool.pool_id, offset=number * NBYTES, nbytes=NBYTES, generation=generation, num_tokens=3,
            width=8, dtype="float32", owner=owner,
        )  # fmt: skip


@pytest.fixture
def served() -> Iterator[Served]:
    made = Served()
    yield made
    made.close()


@pytest.fixture
def view(served: Served) -> Iterator[RemoteView]:
    made = pools.open_view(served.pool)
    assert isinstance(made, RemoteView)
    yield made
    made.close()


def test_what_is_stored_from_afar_is_read_near_and_far(served: Served, view: RemoteView) -> None:
    for number in range(3):
        view.write(served.slot(number), DATA, "encoder")
        assert bytes(served.local.read(served.slot(number))) == DATA
        assert bytes(view.read(served.slot(number))) == DATA
    served.local.write(served.slot(4), DATA[::-1], "encoder")
    data = view.read(served.slot(4))
    assert bytes(data) == DATA[::-1]
    assert not data.readonly, "torch makes tensors of it"


@pytest.mark.parametrize(
    "wrong",
    [
        {"generation": 8},
        {"owner": "another"},
        {"width": 4, "num_tokens": 6},
        {"dtype": "float16", "width": 16},
        {"offset": NBYTES},
        {"pool_id": "gone"},
    ],
)
def test_a_slot_that_holds_something_else_is_refused(served: Served, view: RemoteView, wrong: dict) -> None:
    view.write(served.slot(), DATA, "encoder")
    with pytest.raises(StaleSlotError):
        view.read(msgspec.structs.replace(served.slot(), **wrong))
    assert bytes(view.read(served.slot())) == DATA, "and the next question is answered"


def test_data_that_is_not_what_was_written_is_refused(served: Served, view: RemoteView) -> None:
    view.write(served.slot(), DATA, "encoder")
    served.local.memory[128 + 5] ^= 1
    with pytest.raises(StaleSlotError, match="checksum differs"):
        view.read(served.slot())


def test_what_does_not_fit_its_slot_is_not_stored(served: Served, view: RemoteView) -> None:
    view.write(served.slot(), DATA, "encoder")
    with pytest.raises(ValueError, match="bytes for"):
        view.write(served.slot(), DATA[:-4], "encoder")
    with pytest.raises(ValueError, match="of a pool of"):
        view.write(served.slot(1 << 12), DATA, "encoder")
    with pytest.raises(StaleSlotError, match="gone"):
        view.write(msgspec.structs.replace(served.slot(), pool_id="gone"), DATA, "encoder")
    assert bytes(view.read(served.slot())) == DATA


def test_a_host_that_does_not_answer_holds_nobody_up_for_long(served: Served) -> None:
    now = 0.0
    view = RemoteView(served.pool, timeout_s=0.1, clock=lambda: now)
    view.write(served.slot(), DATA, "encoder")
    served.stop()
    with pytest.raises(StaleSlotError, match=r"has not answered in 0\.1 s"):
        view.read(served.slot())
    with pytest.raises(PoolError, match="does not answer"):
        view.write(served.slot(1), DATA, "encoder")
    served.serve(served.pool.address)
    with pytest.raises(StaleSlotError, match="does not answer"):
        view.read(served.slot())
    now = AWAY_S + 0.1
    assert bytes(view.read(served.slot())) == DATA
    view.close()


def test_an_answer_that_comes_too_late_is_not_taken_for_another(served: Served) -> None:
    view = RemoteView(served.pool, timeout_s=5)
    view.write(served.slot(0), DATA, "encoder")
    view.write(served.slot(1), DATA[::-1], "encoder")
    assert view._sock
    stray = msgspec.msgpack.encode({"number": 999, "slot": msgspec.to_builtins(served.slot(0))})
    view._sock.send_multipart([stray])  # as one that was given up
    assert bytes(view.read(served.slot(1))) == DATA[::-1]
    view.close()


def test_malformed_questions_cost_nobody_else_anything(served: Served, view: RemoteView) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as sock:
        sock.setsockopt(zmq.LINGER, 0)
        sock.connect(served.pool.address)
        for parts in ([b""], [b"\xff" * 9], [b"\x81\xa6number\x01"], [b"", b"", b""]):
            sock.send_multipart(parts)
        view.write(served.slot(), DATA, "encoder")
        assert bytes(view.read(served.slot())) == DATA


@pytest.mark.parametrize("address", ["tcp://*:0", "tcp://0.0.0.0:0"])
def test_an_address_that_others_cannot_use_is_refused(served: Served, address: str) -> None:
    with pytest.raises(PoolError, match="name one address"):
        SlotServer(address, served.pool, served.local.memory)


def test_without_an_address_a_pool_of_another_host_cannot_be_opened(served: Served) -> None:
    with pytest.raises(PoolError, match=r"on host far.*cache\.address"):
        pools.open_view(msgspec.structs.replace(served.pool, address=""))


def test_containers_of_one_host_say_so(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(hosts.VARIABLE, "far")
    near = pools.open_view(served.pool)
    assert isinstance(near, SharedMemoryView)
    near.close()


def test_a_pool_says_from_where_it_is_reached() -> None:
    pool = Pool(pool_id="p", kind="shared_memory", name="p", nbytes=1, host="a")
    assert pool.reached_from("a")
    assert not pool.reached_from("b")
    assert msgspec.structs.replace(pool, address="tcp://a:1").reached_from("b")

"""Pools of other hosts: a real server on an event loop, and views with threads of their own."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import msgspec
import pytest
import zmq

from cache import pools
from cache.pools import PoolError, SharedMemoryView
from cache.pools.remote import RemoteView
from cache.pools.server import SlotServer
from cache.slot import StaleSlotError
from epd.messages import Pool
from epd.process import hosts
from tests.cache.served import DATA, NBYTES, Served


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


def test_many_slots_are_on_their_way_at_a_time(served: Served, view: RemoteView) -> None:
    stores = [view.store(served.slot(n), bytes([n]) * 96, "encoder") for n in range(50)]
    fetches = [view.fetch(served.slot(n)) for n in range(50)]
    assert [one.result(5) for one in stores] == [None] * 50
    assert [bytes(one.result(5)) for one in fetches] == [bytes([n]) * 96 for n in range(50)]
    assert len([one for one in threading.enumerate() if one.name == "pool-far"]) == 1


def test_a_host_that_does_not_answer_costs_what_it_owes_and_no_more(served: Served) -> None:
    view = RemoteView(served.pool, timeout_s=0.2)
    view.write(served.slot(), DATA, "encoder")
    served.stop()
    fetches = [view.fetch(served.slot()) for _ in range(3)]
    store = view.store(served.slot(1), DATA, "encoder")
    assert not store.done(), "who asks is not held up"
    for fetch in fetches:
        with pytest.raises(StaleSlotError, match=r"host far .* has not answered in 0\.2 s"):
            fetch.result(5)
    with pytest.raises(PoolError, match="has not answered"):
        store.result(5)
    served.serve(served.pool.address)
    assert bytes(view.read(served.slot())) == DATA
    view.close()


def test_a_slow_host_that_goes_on_answering_is_not_given_up(served: Served) -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as sock:
        port = sock.bind_to_random_port("tcp://127.0.0.1")
        pool = msgspec.structs.replace(served.pool, address=f"tcp://127.0.0.1:{port}")
        view = RemoteView(pool, timeout_s=1.0)
        stores = [view.store(served.slot(n), DATA, "encoder") for n in range(4)]
        asked = [sock.recv_multipart() for _ in stores]
        for (peer, header, _), store in zip(asked, stores, strict=True):
            assert threading.Event().wait(0.4) is False
            number = msgspec.msgpack.decode(header)["number"]
            sock.send_multipart([peer, msgspec.msgpack.encode({"number": number + 1000})])  # of one that was given up
            sock.send_multipart([peer, msgspec.msgpack.encode({"number": number})])
            assert store.result(5) is None
        late = view.fetch(served.slot())
        sock.send_multipart([sock.recv_multipart()[0], b"\xff"])
        with pytest.raises(StaleSlotError, match="sent no valid answer"):
            late.result(5)
        view.close()


def test_a_view_that_is_closed_owes_nothing_and_leaves_nothing(served: Served) -> None:
    def fds() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = fds()
    served.stop()
    view = RemoteView(served.pool, timeout_s=60)
    assert fds() < before, "one that is not used has no thread and no socket"
    before = fds()
    fetch = view.fetch(served.slot())
    view.close()
    view.close()
    with pytest.raises(StaleSlotError, match="is no longer asked"):
        fetch.result(0)
    with pytest.raises(PoolError, match="is closed"):
        view.write(served.slot(), DATA, "encoder")
    assert fds() == before
    assert not [one for one in threading.enumerate() if one.name == "pool-far"]


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

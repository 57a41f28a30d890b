"""Whether a prefill engine may still be there: False only where that is certain, since its absence frees memory."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import msgspec
import pytest
import zmq

pytestmark = pytest.mark.engine


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock


def may_exist(port: int, engine_id: str = "engine-1") -> bool:
    from workers.push_worker import Peer
    from workers.push_worker import may_exist as ask

    return ask(Peer(engine_id, "127.0.0.1", port), timeout_s=0.2)


def test_if_nobody_listens_there_is_no_engine(sock: socket.socket) -> None:
    assert may_exist(sock.getsockname()[1]) is False


def test_a_process_that_does_not_answer_may_be_the_engine_that_hangs(sock: socket.socket) -> None:
    sock.listen()
    assert may_exist(sock.getsockname()[1]) is True


def test_a_host_that_cannot_be_found_may_have_the_engine() -> None:
    from workers.push_worker import Peer
    from workers.push_worker import may_exist as ask

    assert ask(Peer("engine-1", "no-such-host.invalid", 5600), timeout_s=0.2) is True


@pytest.mark.parametrize(
    ("answer", "expected"), [("engine-1", True), ("engine-2", False), (None, True)], ids=["it", "another", "nonsense"]
)
def test_the_engine_that_answers_decides(answer: str | None, expected: bool) -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.metadata import NixlHandshakePayload

    agent = msgspec.msgpack.encode({"engine_id": answer, "num_blocks": 7})
    handshake = NixlHandshakePayload(compatibility_hash="x", agent_metadata_bytes=agent)
    payload = msgspec.msgpack.encode(handshake) if answer else b"nonsense"
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        port = router.bind_to_random_port("tcp://127.0.0.1")

        def serve() -> None:
            identity, empty, _ = router.recv_multipart()
            router.send_multipart([identity, empty, payload, b""])

        server = threading.Thread(target=serve)
        server.start()
        assert may_exist(port) is expected
        server.join(5)

"""Where sockets are made, and with which options."""

import ast
from pathlib import Path

import pytest
import zmq

from epd.config import ConfigError
from epd.transport import wire
from epd.transport.factory import LINGER_MS, UNBOUNDED, AddressError, SocketFactory, address_of

ROOT = Path(__file__).resolve().parent.parent.parent
# What others may use of ZeroMQ: its errors, flags of one call, waiting, and the type of what the factory gives them.
USED = {"Again", "ZMQError", "NOBLOCK", "SNDMORE", "POLLIN", "Poller", "Socket"}


def test_no_other_module_makes_a_socket_or_sets_its_options():
    wrong = []
    for package in ("epd", "broker", "cache", "workers"):
        for path in (ROOT / package).rglob("*.py"):
            if path == ROOT / "epd/transport/factory.py":
                continue
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                is_zmq = isinstance(node, ast.Attribute) and ast.unparse(node.value) == "zmq"
                if is_zmq and node.attr not in USED:
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} uses zmq.{node.attr}")
                if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "zmq":
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} imports from zmq")
    assert not wrong, "\n".join(wrong)


@pytest.fixture
def sockets():
    with SocketFactory() as made:
        yield made


def test_every_kind_has_all_options(sockets):
    router = sockets.bind_router("tcp://127.0.0.1:0", max_waiting=7)
    dealer = sockets.connect_dealer(address_of(router), routing_id=b"me", max_sent=5, linger_ms=0)
    request = sockets.connect_request(address_of(router), timeout_s=0.5)
    for sock, sent, received, linger_ms in (
        (router, 7, 7, LINGER_MS),
        (dealer, 5, UNBOUNDED, 0),
        (request, 1, 1, 0),
    ):
        assert sock.getsockopt(zmq.SNDHWM) == sent
        assert sock.getsockopt(zmq.RCVHWM) == received
        assert sock.getsockopt(zmq.LINGER) == linger_ms
        assert sock.getsockopt(zmq.MAXMSGSIZE) == wire.MAX_MESSAGE_BYTES
        assert sock.getsockopt(zmq.TCP_KEEPALIVE) == 1
        assert sock.getsockopt(zmq.TCP_MAXRT) > 0
    assert dealer.getsockopt(zmq.IDENTITY) == b"me"
    assert request.getsockopt(zmq.RCVTIMEO) == 500


def test_a_router_says_so_when_a_peer_is_not_there(sockets):
    router = sockets.bind_router("tcp://127.0.0.1:0", max_waiting=UNBOUNDED)
    with pytest.raises(zmq.ZMQError, match="Host unreachable"):
        router.send_multipart([b"nobody", b"hello"])


def test_where_nobody_can_listen_the_address_is_named(sockets):
    listening = sockets.bind_router("tcp://127.0.0.1:0", max_waiting=UNBOUNDED)
    for address in (address_of(listening), "nonsense"):
        with pytest.raises(AddressError, match=f"cannot listen on {address}"):
            sockets.bind_router(address, max_waiting=UNBOUNDED)
    assert issubclass(AddressError, ConfigError), "the command line tells the user"


def test_closing_a_factory_lets_last_words_leave():
    with SocketFactory() as here:
        router = here.bind_router("tcp://127.0.0.1:0", max_waiting=UNBOUNDED)
        with SocketFactory() as there:
            dealer = there.connect_dealer(address_of(router), max_sent=10)
            dealer.send(b"goodbye")
        assert router.poll(2000)
        assert router.recv_multipart()[1] == b"goodbye"

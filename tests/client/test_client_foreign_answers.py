"""Whatever answers at the address, in whatever shape: what comes is an answer or an error of the documented tree."""

from __future__ import annotations

import gzip
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Self

import pytest

from epd.client import AsyncClient, EPDError, Timeouts

OK = b"HTTP/1.1 200 OK\r\n"
NINES = b"9" * 5000
PICTURE = b"BM" + bytes(20)


class AnyServer:
    """Answers each connection with the same bytes, then closes it."""

    def __init__(self) -> None:
        self.answer = b""
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(5)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                try:
                    connection.settimeout(2)
                    connection.recv(1 << 20)
                    connection.sendall(self.answer)
                except OSError:
                    pass


@pytest.fixture(scope="module")
def server() -> Iterator[AnyServer]:
    with AnyServer() as server:
        yield server


def http(body: bytes, head: bytes = b"", status: bytes = b"200 OK") -> bytes:
    return b"HTTP/1.1 %b\r\n%bContent-Length: %d\r\n\r\n%b" % (status, head, len(body), body)


BODIES = {
    "no UTF-8": b'"\xff"',
    "UTF-16": '{"choices": []}'.encode("utf-16"),
    "lists without end": b"[" * 100_000,
    "objects without end": b'{"a":' * 50_000,
    "a number too large": b'{"choices": [{"index": 1e999}]}',
    "digits without end": b'{"choices": [{"index": "%b", "message": {}}]}' % NINES,
    "index of text": b'{"choices": [{"index": "x", "message": {}}]}',
    "choices of null": b'{"choices": [null]}',
    "choices of a number": b'{"choices": 5}',
    "choices of text": b'{"choices": "abc"}',
    "choices by name": b'{"choices": {"a": 1}}',
    "message of text": b'{"choices": [{"index": 0, "message": "hi"}]}',
    "message of null": b'{"choices": [{"index": null, "message": null}]}',
    "a number": b"5",
    "null": b"null",
    "nothing": b"",
    "half a surrogate": b'"\\ud800"',
    "models of numbers": b'{"data": [5]}',
    "models of null": b'{"data": null}',
    "cancelled text": b'{"cancelled": "x"}',
    "cancelled digits": b'{"cancelled": "%b"}' % NINES,
    "media of text": b'{"id": 1, "width": "x"}',
    "media of digits": b'{"id": 1, "width": "%b", "height": 1, "patches": 1, "expires": 1}' % NINES,
    "error with digits": b'{"error": {"code": "%b", "message": "m"}}' % NINES,
    "error of a list": b'{"error": [1, 2]}',
    "error of objects": b'{"error": {"message": {"a": 1}, "code": {"b": 1}}}',
    "error of a number": b'{"error": 7}',
    "error with foreign digits": '{"error": {"code": "٤٠٤", "message": "m"}}'.encode(),
    "error with a superscript": '{"error": {"code": "²", "message": "m"}}'.encode(),
}
RAW = {
    "nothing": b"",
    "blank lines": b"\r\n\r\n\r\n",
    "garbage": b"\0\1\2garbage\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a header without end": OK + b"X: " + b"a" * 100_000 + b"\r\n\r\n",
    "headers without end": OK + b"".join(b"X%d: a\r\n" % i for i in range(5000)) + b"\r\n",
    "no gzip": http(b"xxxx", b"Content-Encoding: gzip\r\n"),
    "half of a gzip": http(gzip.compress(b"{}" * 1000)[:20], b"Content-Encoding: gzip\r\n"),
    "no deflate": http(b"\xff\xff\xff", b"Content-Encoding: deflate\r\n"),
    "no brotli": http(b"xxxx", b"Content-Encoding: br\r\n"),
    "unknown encoding": http(b"xxxx", b"Content-Encoding: rot13\r\n"),
    "no chunk": OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n",
    "half a chunk": OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab",
    "two lengths": OK + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    "length of text": OK + b"Content-Length: abc\r\n\r\n",
    "negative length": OK + b"Content-Length: -1\r\n\r\n",
    "less than said": OK + b"Content-Length: 100\r\n\r\nabc",
    "more than said": http(b"{}") + b"JUNK JUNK\r\n\r\n",
    "continue": b"HTTP/1.1 100 Continue\r\n\r\n",
    "switch": b"HTTP/1.1 101 Sw\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    "status 999": http(b"x", status=b"999 X"),
    "status 0": http(b"x", status=b"000 X"),
    "no content": b"HTTP/1.1 204 No\r\n\r\n",
    "headers not ASCII": http(b"x", b"X-Request-Id: \xff\xfe\r\nRetry-After: \xb2\r\n", b"503 X"),
    "wait for digits": http(b"x", b"Retry-After: %b\r\n" % NINES, b"503 X"),
    "wait since ever": http(b"x", b"Retry-After: Mon, 01 Jan 0001 00:00:00 +2359\r\n", b"503 X"),
    "wait for ever": http(b"x", b"Retry-After: Fri, 31 Dec 9999 23:59:59 -2359\r\n", b"503 X"),
    "elsewhere": http(b"", b"Location: http://[::bad\r\n", b"307 X"),
    "unknown charset": http(b"{}", b"Content-Type: application/json; charset=nope\r\n"),
}


def answers() -> Iterator[tuple[str, bytes]]:
    yield from RAW.items()
    for name, body in BODIES.items():
        for status in (b"200 OK", b"404 X", b"500 X"):
            yield f"{name}, {status.decode()}", http(body, status=status)
        events = b"Content-Type: text/event-stream\r\n"
        yield f"{name}, event", http(b"data: " + body + b"\n\n", events)
        yield f"{name}, in an event", http(b'data: {"choices": [{"index": 0, "delta": ' + body + b"}]}\n\n", events)


async def streamed(client: AsyncClient) -> None:
    async for _ in client.stream("?"):
        pass


CALLS: dict[str, Callable[[AsyncClient], Awaitable[Any]]] = {
    "generate": lambda client: client.generate("?"),
    "stream": streamed,
    "upload": lambda client: client.upload(PICTURE),
    "models": lambda client: client.models(),
    "health": lambda client: client.health(),
    "request": lambda client: client.request("a"),
    "cancel": lambda client: client.cancel("a"),
    "cache": lambda client: client.cache(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_whatever_answers_only_documented_errors_come(
    server: AnyServer, call: Callable[[AsyncClient], Awaitable[Any]]
) -> None:
    clocks = Timeouts(connect_s=3, first_token_s=3, token_s=3, total_s=3)
    others: list[tuple[str, BaseException]] = []
    async with AsyncClient(server.url, timeouts=clocks) as client:
        for name, server.answer in answers():
            try:
                await call(client)
            except EPDError as error:
                assert str(error)
            except Exception as error:
                others.append((name, error))
    assert others == []

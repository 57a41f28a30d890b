"""HTTP as the world sends it: what is read, and that what is not is answered with a reason in the API's shape."""

import asyncio
import contextlib
import gzip
import json
import zlib

import pytest
from aiohttp import web

from epd.endpoint.http.asgi import AsgiBridge
from epd.endpoint.http.listening import runner_of
from epd.endpoint.http.unreadable import unreadable_body


async def echo(scope, receive, send):
    """Answers with the body, or not at all where the client has gone."""
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body += message["body"]
        if not message["more_body"]:
            break
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@contextlib.asynccontextmanager
async def listening(app=echo):
    runner = runner_of(AsgiBridge(app, refusal=unreadable_body), 1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()


async def send(raw, app=echo):
    """The status and the body of the answer to these bytes."""
    async with listening(app) as port, asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(raw)
        await writer.drain()
        answer = await reader.read()
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), head, body


def request(headers=b"", body=b"hello", path=b"/v1/chat/completions"):
    length = b"Content-Length: %d\r\n" % len(body)
    return b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" + length + headers + b"\r\n" + body


@pytest.mark.parametrize(
    "headers",
    [
        b"Cookie: " + b"c" * 32_768 + b"\r\n",
        b"".join(b"X-%d: y\r\n" % i for i in range(200)),
        b"".join(b"X-%d: %s\r\n" % (i, b"y" * 500) for i in range(100)),
        b"X-Unicode: \xc3\xa9\xff\r\n",
    ],
    ids=["one of 32 KiB", "200", "50 KB", "no ASCII"],
)
async def test_headers_of_browsers_and_gateways_are_taken(headers):
    status, _, body = await send(request(headers))
    assert (status, body) == (200, b"hello")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (b"Cookie: " + b"c" * 100_000 + b"\r\n", 431),
        (b"".join(b"X-%d: y\r\n" % i for i in range(300)), 431),
        (b"".join(b"X-%d: %s\r\n" % (i, b"y" * 2000) for i in range(100)), 431),
        (b"Content-Length: 7\r\n", 400),
        (b"Transfer-Encoding: chunked\r\n", 400),
        (b"no colon\r\n", 400),
        (b"Bad Name: x\r\n", 400),
        (b"Expect: miracles\r\n", 417),
    ],
    ids=["one huge", "300", "200 KB", "two lengths", "length and chunks", "no colon", "bad name", "expectation"],
)
async def test_input_that_is_not_http_or_too_large_is_refused_with_a_reason(headers, status):
    found, head, body = await send(request(headers))
    error = json.loads(body)["error"]
    assert found == status == error["code"] and error["message"] and error["type"]
    assert b"application/json" in head


@pytest.mark.parametrize(
    "raw", [b"\x16\x03\x01\x02\x00\x01\x00", b"GET /\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\0" * 99 + b"\r\n\r\n"]
)
async def test_input_that_is_not_http_is_answered_or_cut_off(raw):
    async with listening() as port, asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(raw)
        writer.write_eof()
        answer = await reader.read()
        writer.close()
    assert not answer or b" 400 " in answer.splitlines()[0]


def raw_deflate(data):
    squeeze = zlib.compressobj(wbits=-15)
    return squeeze.compress(data) + squeeze.flush()


ENCODED = {
    "gzip": gzip.compress(b"hello"), "deflate": zlib.compress(b"hello"), "DEFLATE": raw_deflate(b"hello"),
    "x-gzip": gzip.compress(b"he") + gzip.compress(b"llo"), "identity": b"hello", "GZip ": gzip.compress(b"hello"),
}  # fmt: skip


@pytest.mark.parametrize("encoding", ENCODED)
async def test_encoded_bodies_are_decoded(encoding):
    status, _, body = await send(request(b"Content-Encoding: %s\r\n" % encoding.encode(), ENCODED[encoding]))
    assert (status, body) == (200, b"hello")


async def test_what_is_small_when_it_is_packed_comes_in_pieces():
    sizes = []

    async def app(scope, receive, send):
        more = True
        while more:
            message = await receive()
            sizes.append(len(message["body"]))
            more = message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    status, _, _ = await send(request(b"Content-Encoding: gzip\r\n", gzip.compress(bytes(50 << 20))), app)
    assert status == 200 and sum(sizes) == 50 << 20 and max(sizes) <= 256 << 10


@pytest.mark.parametrize("keeps", [False, True], ids=["close", "keep-alive"])
@pytest.mark.parametrize("encoding", ["gzip", "deflate", "x-gzip"])
@pytest.mark.parametrize("path", [b"/v1/chat/completions", b"/v1/messages"])
async def test_a_body_that_is_not_encoded_as_it_says_is_refused_in_the_apis_shape(encoding, path, keeps):
    packed = ENCODED[encoding]
    for body in (b'{"model": 1}', packed[:-1], packed[:-5], packed[:3], packed + b"more", b"\x78\x9c", b"\x1f\x8b"):
        raw = request(b"Content-Encoding: %s\r\n" % encoding.encode(), body, path)
        if keeps:
            raw = raw.replace(b"Connection: close\r\n", b"")
        async with listening() as port, asyncio.timeout(5):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(raw)
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                int(line.split()[1]) for line in head.splitlines() if line.lower().startswith(b"content-length")
            )
            told = json.loads(await reader.readexactly(length))
            writer.close()
        assert b" 400 " in head.splitlines()[0], body
        assert told["error"]["type"] == "invalid_body" and encoding in told["error"]["message"]
        assert ("type" in told) == (path == b"/v1/messages")


async def test_chunks_that_are_none_are_refused():
    raw = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"
    status, _, body = await send(raw)
    assert status == 400 and json.loads(body)["error"]["message"]


async def test_a_client_that_asks_first_is_told_to_go_on():
    async with listening() as port, asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(
            request(b"Expect: 100-continue\r\n", b"")[:-2].replace(b"Content-Length: 0", b"Content-Length: 5") + b"\r\n"
        )
        assert await reader.readline() == b"HTTP/1.1 100 Continue\r\n"
        await reader.readline()
        writer.write(b"hello")
        answer = await reader.read()
        writer.close()
    assert b"200 OK" in answer and answer.endswith(b"hello")


async def test_an_application_that_raises_over_an_unreadable_body_is_answered_for():
    async def raises(scope, receive, send):
        if (await receive())["type"] == "http.disconnect":
            raise RuntimeError("the client has gone")

    status, _, body = await send(request(b"Content-Encoding: gzip\r\n"), raises)
    assert status == 400 and json.loads(body)["error"]["type"] == "invalid_body"

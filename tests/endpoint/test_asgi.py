"""The ASGI bridge: small ASGI apps behind a real aiohttp server."""

import asyncio
import contextlib
import json

import aiohttp
import pytest
from aiohttp import web

from epd.endpoint.http.asgi import AsgiBridge, Lifespan


@contextlib.asynccontextmanager
async def serving(app, **options):
    """A session whose base URL is a server that carries `app`."""
    bridge = AsgiBridge(app, **options)
    http = web.Application()
    http.router.add_route("*", "/{tail:.*}", bridge.handle)
    runner = web.AppRunner(
        http, handler_cancellation=True, access_log=None, shutdown_timeout=0.5, auto_decompress=False
    )
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    try:
        async with aiohttp.ClientSession(f"http://{host}:{port}") as session:
            session.bridge = bridge
            yield session
    finally:
        await runner.cleanup()


async def start(send, status=200, *headers):
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})


async def body(send, data=b"", more=False):
    await send({"type": "http.response.body", "body": data, "more_body": more})


async def echo(scope, receive, send):
    """Answers with what it was asked: the scope and the size of the body."""
    size, chunks = 0, 0
    while True:
        message = await receive()
        size, chunks = size + len(message["body"]), chunks + 1
        if not message["more_body"]:
            break
    plain = {k: v for k, v in scope.items() if isinstance(v, str)}
    plain |= {"raw_path": scope["raw_path"].decode(), "query": scope["query_string"].decode(), "size": size}
    plain |= {"headers": {k.decode(): v.decode() for k, v in scope["headers"]}, "chunks": chunks}
    await start(send, 200, (b"content-type", b"application/json"), (b"set-cookie", b"a=1"), (b"set-cookie", b"b=2"))
    await body(send, json.dumps(plain).encode())


async def test_the_scope_says_what_was_asked():
    asked = {"data": b"hello", "headers": {"X-Thing": "yes"}}
    async with serving(echo, root_path="/api") as session, session.post("/a%20b/c?x=1&y=%26", **asked) as answer:
        assert answer.status == 200
        assert answer.headers.getall("Set-Cookie") == ["a=1", "b=2"]
        scope = await answer.json()
    assert scope["path"] == "/api/a b/c" and scope["raw_path"] == "/a%20b/c" and scope["query"] == "x=1&y=%26"
    assert scope["method"] == "POST" and scope["root_path"] == "/api" and scope["http_version"] == "1.1"
    assert scope["headers"]["x-thing"] == "yes" and scope["size"] == 5


async def test_a_large_body_comes_in_chunks():
    async with serving(echo) as session, session.post("/", data=bytes(3 << 20)) as answer:
        scope = await answer.json()
    assert scope["size"] == 3 << 20 and scope["chunks"] > 1


async def test_each_chunk_is_written_at_once():
    gates = [asyncio.Event() for _ in range(3)]

    async def app(_scope, _receive, send):
        await start(send, 200, (b"content-type", b"text/event-stream"))
        for i, gate in enumerate(gates):
            await gate.wait()
            await body(send, b"chunk %d" % i, more=True)
        await body(send)

    async with serving(app) as session:
        gates[0].set()
        async with session.get("/") as answer:
            for i in range(3):
                gates[i].set()
                assert await asyncio.wait_for(answer.content.readany(), 2) == b"chunk %d" % i
            assert await answer.content.read() == b""


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS"])
async def test_methods_without_a_body_of_their_own_work(method):
    async def app(scope, _receive, send):
        assert scope["method"] == method
        await start(send, 200, (b"content-length", b"4"), (b"x-it", b"works"))
        await body(send, b"four")

    async with serving(app) as session, session.request(method, "/") as answer:
        assert answer.headers["X-It"] == "works" and answer.headers["Content-Length"] == "4"
        assert await answer.read() == (b"" if method == "HEAD" else b"four")


async def test_the_connection_is_reused_after_an_answer_without_content():
    async def app(_scope, _receive, send):
        await start(send, 204)
        await body(send)

    async with serving(app) as session:
        for _ in range(2):
            async with session.get("/") as answer:
                assert answer.status == 204


@pytest.mark.parametrize(("status", "given", "expected"), [(503, None, "7"), (429, b"60", "60"), (200, None, None)])
async def test_retry_after_is_added_where_it_lacks(status, given, expected):
    async def app(_scope, _receive, send):
        await start(send, status, *([(b"retry-after", given)] if given else []))
        await body(send)

    async with serving(app, retry_after_s=7) as session, session.get("/") as answer:
        assert answer.headers.get("Retry-After") == expected


async def test_a_client_that_goes_away_is_a_disconnect():
    seen, started = asyncio.Event(), asyncio.Event()

    async def app(_scope, receive, send):
        await start(send, 200)
        await body(send, b"first", more=True)
        started.set()
        while (await receive())["type"] != "http.disconnect":
            pass
        await body(send, b"nobody hears this", more=True)
        seen.set()

    async with serving(app) as session:
        async with session.get("/") as answer:
            await started.wait()
            answer.close()
        await asyncio.wait_for(seen.wait(), 1)
        await asyncio.wait_for(session.bridge.wait_idle(), 1)


async def test_an_app_that_ignores_the_disconnect_is_cancelled_after_the_grace_time():
    cancelled, started = asyncio.Event(), asyncio.Event()

    async def app(_scope, _receive, _send):
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async with serving(app, grace_s=0.05) as session:
        request = asyncio.create_task(session.get("/"))
        await started.wait()
        request.cancel()
        await asyncio.wait_for(cancelled.wait(), 1)


async def test_an_app_that_raises_before_its_response_gives_500():
    async def app(_scope, _receive, _send):
        raise ValueError("secret")

    async with serving(app) as session, session.get("/") as answer:
        assert answer.status == 500
        assert "secret" not in await answer.text()


async def test_a_response_that_is_cut_short_never_looks_whole():
    async def app(_scope, _receive, send):
        await start(send, 200)
        await body(send, b"half", more=True)
        raise ValueError

    async with serving(app) as session, session.get("/") as answer:
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.read()


async def test_an_app_that_returns_without_an_answer_gives_500():
    async def app(_scope, _receive, _send):
        pass

    async with serving(app) as session, session.get("/") as answer:
        assert answer.status == 500


async def test_the_lifespan_starts_and_stops_once():
    seen = []

    async def app(scope, receive, send):
        assert scope["type"] == "lifespan"
        while True:
            message = await receive()
            seen.append(message["type"])
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return

    async with Lifespan(app):
        assert seen == ["lifespan.startup"]
    assert seen == ["lifespan.startup", "lifespan.shutdown"]


async def test_a_startup_that_fails_says_why():
    async def app(_scope, receive, send):
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no disk"})

    with pytest.raises(RuntimeError, match="no disk"):
        async with Lifespan(app):
            pass


async def test_an_app_without_a_lifespan_is_left_alone():
    async def app(scope, _receive, _send):
        raise AssertionError(scope["type"])

    async with Lifespan(app):
        pass

"""An ASGI 3 application behind an aiohttp server: requests in, responses out as they are produced.

Lives in the endpoint process; owns the task that each HTTP exchange runs in and the lifespan of the application.
Knows nothing of vLLM. The server must run with `handler_cancellation=True`, which is how a client that goes away
is noticed; the application then reads `http.disconnect` and is cancelled if it has not ended after a grace time.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Self

import aiohttp
import structlog
from aiohttp import web

from epd.endpoint.http import encodings
from epd.endpoint.http.encodings import Decoder, EncodingError

log = structlog.get_logger()

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Refusal = Callable[[str, str], bytes]

_CHUNK_BYTES = 256 << 10
_BODILESS = frozenset({204, 304})
# 2.3, not 2.4: the application must watch `receive` for the disconnect, so that it notices it between two chunks.
_ASGI = {"version": "3.0", "spec_version": "2.3"}


class AsgiBridge:
    """Runs aiohttp requests through an ASGI application: `handle` is the handler.

    Args:
        app: the application.
        root_path: where it is mounted, as in ASGI.
        grace_s: how long the application may go on after the client has gone before it is cancelled.
        retry_after_s: the `Retry-After` of each 429 and 503 that has none.
        refusal: makes the JSON that says that a body cannot be read, from the request's path and the reason.
    """

    def __init__(
        self,
        app: App,
        *,
        root_path: str = "",
        grace_s: float = 2.0,
        retry_after_s: int = 1,
        refusal: Refusal | None = None,
    ) -> None:
        self._app, self._root_path = app, root_path
        self._refusal = refusal or _refusal
        self._last = False
        self._grace_s, self._retry_after_s = grace_s, retry_after_s
        self._num_active = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def close_connections(self) -> None:
        """Makes each response from now on the last on its connection; the response says so."""
        self._last = True

    @property
    def num_active(self) -> int:
        """Exchanges under way."""
        return self._num_active

    async def wait_idle(self) -> None:
        """Returns once no exchange is under way."""
        await self._idle.wait()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answers one request; when this returns, the response is complete or its connection is closed."""
        exchange = _Exchange(request, self._retry_after_s, lambda: self._last)
        scope = self._scope(request)
        self._num_active += 1
        self._idle.clear()
        task = asyncio.create_task(self._run(scope, exchange), name=f"asgi-{request.method}-{request.path}")
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            exchange.disconnect()
            await self._end(task)
            raise
        finally:
            self._num_active -= 1
            if not self._num_active:
                self._idle.set()
        return exchange.response or web.Response(status=500)

    async def _run(self, scope: Scope, exchange: _Exchange) -> None:
        try:
            await self._app(scope, exchange.receive, exchange.send)
        except Exception as error:
            if exchange.complete or exchange.disconnected:
                log.debug("the application raised after its response", error=repr(error))
                return
            if not await self._refuse(scope, exchange):
                log.exception("the application raised", path=scope["path"])
                await exchange.fail()
        else:
            if await self._refuse(scope, exchange):
                return
            if not exchange.complete and not exchange.disconnected:
                log.error("the application returned before its response was complete", path=scope["path"])
                await exchange.fail()

    async def _refuse(self, scope: Scope, exchange: _Exchange) -> bool:
        """Answers for an application that could not read the body; false if that is not the reason."""
        if not exchange.unreadable or exchange.response is not None:
            return False
        await exchange.answer(400, self._refusal(scope["path"], exchange.unreadable))
        return True

    async def _end(self, task: asyncio.Task[None]) -> None:
        done, _ = await asyncio.wait([task], timeout=self._grace_s)
        if not done:
            task.cancel()
            await asyncio.wait([task], timeout=self._grace_s)

    def _scope(self, request: web.BaseRequest) -> Scope:
        raw_path, _, query = request.raw_path.partition("?")
        host, port = request.transport.get_extra_info("sockname")[:2] if request.transport else ("", None)
        peer = request.transport.get_extra_info("peername") if request.transport else None
        return {
            "type": "http",
            "asgi": _ASGI,
            "http_version": f"{request.version.major}.{request.version.minor}",
            "method": request.method,
            "scheme": request.scheme,
            "path": self._root_path + request.path,
            "raw_path": raw_path.encode("latin-1"),
            "query_string": query.encode("latin-1"),
            "root_path": self._root_path,
            "headers": [(name.lower(), value) for name, value in request.raw_headers],
            "client": tuple(peer[:2]) if peer else None,
            "server": (host, port),
            "state": {},
        }


class _Exchange:
    """The two callables that one run of the application gets, and the state of its response."""

    def __init__(self, request: web.BaseRequest, retry_after_s: int, is_last: Callable[[], bool]) -> None:
        self._request, self._retry_after_s, self._is_last = request, retry_after_s, is_last
        self._gone = asyncio.Event()
        self._body_read = False
        encoding = request.headers.get("Content-Encoding", "").strip().lower()
        self._decoder = Decoder(encoding) if encoding in encodings.KNOWN else None
        self.unreadable = ""  # why the body cannot be read
        self._start: Message | None = None
        self.response: web.StreamResponse | None = None
        self.complete = False

    @property
    def disconnected(self) -> bool:
        return self._gone.is_set()

    def disconnect(self) -> None:
        self._gone.set()

    async def receive(self) -> Message:
        if not self._body_read and not self.disconnected:
            try:
                chunk = await self._chunk()
            except (web.RequestPayloadError, EncodingError) as error:
                # ASGI has no word for that: to the application, the client has gone.
                self._body_read, self.unreadable = True, str(error) or "the body cannot be read"
                return {"type": "http.disconnect"}
            except (ConnectionError, aiohttp.ClientError):
                self.disconnect()
                return {"type": "http.disconnect"}
            return {"type": "http.request", "body": chunk, "more_body": not self._body_read}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _chunk(self) -> bytes:
        """The next part of the body, decoded."""
        content, decoder = self._request.content, self._decoder
        if decoder is None:
            chunk = await content.read(_CHUNK_BYTES)
            self._body_read = not chunk or content.at_eof()
            return chunk
        chunk, ended = b"", content.at_eof()
        while not chunk and not self._body_read:
            data = b"" if ended or decoder.has_more else await content.read(_CHUNK_BYTES)
            ended = ended or content.at_eof()
            chunk = decoder.feed(data, _CHUNK_BYTES)
            if ended and not decoder.has_more:
                decoder.finish()
                self._body_read = True
        return chunk

    async def send(self, message: Message) -> None:
        if self.disconnected:
            return
        try:
            await self._send(message)
        except ConnectionError:
            self.disconnect()

    async def _send(self, message: Message) -> None:
        kind = message["type"]
        if kind == "http.response.start":
            if self._start is not None:
                raise RuntimeError("http.response.start was sent twice")
            self._start = message
        elif kind == "http.response.body":
            await self._send_body(message.get("body", b""), message.get("more_body", False))
        else:
            raise RuntimeError(f"unexpected ASGI message {kind!r}")

    async def _send_body(self, body: bytes, more: bool) -> None:
        if self._start is None or self.complete:
            raise RuntimeError("http.response.body outside a response")
        if self.response is None:
            self.response = self._make_response(self._start)
            await self.response.prepare(self._request)
        if body and self._request.method != "HEAD" and self.response.status not in _BODILESS:
            await self.response.write(bytes(body))
        if not more:
            await self.response.write_eof()
            self.complete = True

    def _make_response(self, start: Message) -> web.StreamResponse:
        response = web.StreamResponse(status=start["status"])
        for name, value in start.get("headers", ()):
            if name.lower() not in (b"transfer-encoding", b"connection"):
                response.headers.add(name.decode("latin-1"), value.decode("latin-1"))
        if response.status in (429, 503) and "Retry-After" not in response.headers:
            response.headers["Retry-After"] = str(self._retry_after_s)
        if self._is_last():
            response.force_close()
        return response

    async def answer(self, status: int, body: bytes) -> None:
        """Answers with JSON in place of an application that has sent nothing."""
        self._start, self.response, self.complete = None, None, False
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    async def fail(self) -> None:
        """Ends a response that the application did not: with 500 if nothing was sent; otherwise the connection is cut.

        A cut connection tells the client that the body is incomplete.
        """
        if self.response is None:
            body = b'{"error":{"message":"Internal server error","type":"InternalServerError","code":500}}'
            await self.answer(500, body)
        elif self._request.transport is not None:
            self._request.transport.abort()


def _refusal(_path: str, message: str) -> bytes:
    return json.dumps({"error": {"message": message, "type": "invalid_body", "code": 400}}).encode()


class Lifespan:
    """Runs an ASGI application's startup on entry and its shutdown on exit, each once.

    An application that does not know the lifespan protocol is left alone, as the specification says.
    """

    def __init__(self, app: App, *, timeout_s: float = 30.0) -> None:
        self._app, self._timeout_s = app, timeout_s
        self._events: asyncio.Queue[Message] = asyncio.Queue()
        self._started, self._stopped = asyncio.Event(), asyncio.Event()
        self._failure: str | None = None
        self._supported = True
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._run(), name="asgi-lifespan")
        self._events.put_nowait({"type": "lifespan.startup"})
        await asyncio.wait_for(self._started.wait(), self._timeout_s)
        if self._failure is not None:
            raise RuntimeError(f"the application did not start: {self._failure}")
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        if self._supported:
            self._events.put_nowait({"type": "lifespan.shutdown"})
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), self._timeout_s)
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        try:
            await self._app({"type": "lifespan", "asgi": _ASGI, "state": {}}, self._events.get, self._send)
        except Exception as error:
            if not self._started.is_set():
                self._supported = False
                log.debug("the application has no lifespan", error=repr(error))
            else:
                log.warning("the application's lifespan raised", error=repr(error))
        finally:
            self._started.set()
            self._stopped.set()

    async def _send(self, message: Message) -> None:
        match message["type"]:
            case "lifespan.startup.complete":
                self._started.set()
            case "lifespan.startup.failed":
                self._failure = message.get("message", "") or "no reason given"
                self._started.set()
            case "lifespan.shutdown.complete" | "lifespan.shutdown.failed":
                self._stopped.set()

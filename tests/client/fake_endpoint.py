"""A tiny OpenAI-compatible endpoint in a thread of its own, whose answers each test sets."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, Self

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class FakeEndpoint:
    """Serves on port 0 from a background thread, so that a test may block its own event loop.

    Attributes:
        answer: Handles the chat completions; set by the test.
        bodies: The JSON bodies of the chat completions, as received.
        headers: Their headers.
        uploads: The files posted to ``/v1/media``, with their salts.
        refuse_upload: Answers an upload instead, if set.
        media_expires_in: How long uploads are kept, in seconds.
        cancelled: Set when a client hung up on a request that was being answered.
    """

    def __init__(self) -> None:
        self.answer: Handler = complete("hello")
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.uploads: list[tuple[bytes, str]] = []
        self.upload_headers: list[dict[str, str]] = []
        self.refuse_upload: Callable[[], web.Response] | None = None
        self.media_expires_in = 300
        self.num_connections = 0
        self.cancelled = threading.Event()
        self.is_ready = True
        self.url = ""
        self._started = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._loop.close()

    async def _serve(self) -> None:
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/media", self._media)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/requests/{id}", self._request)
        app.router.add_post("/v1/requests/{id}/cancel", self._cancel)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._ready)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._started.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.json())
        self.headers.append(dict(request.headers))
        try:
            return await self.answer(request)
        except (asyncio.CancelledError, ConnectionError):
            self.cancelled.set()
            raise

    async def _media(self, request: web.Request) -> web.Response:
        self.uploads.append((await request.read(), request.query.get("cache_salt", "")))
        self.upload_headers.append(dict(request.headers))
        if self.refuse_upload is not None:
            return self.refuse_upload()
        expires = int(time.time()) + self.media_expires_in
        body = {"id": f"m{len(self.uploads)}", "width": 4, "height": 3, "patches": 9, "expires": expires}
        return web.json_response(body)

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "tiny"}, {"id": "other"}]})

    async def _request(self, request: web.Request) -> web.Response:
        if request.match_info["id"] != "chatcmpl-1/ü":
            return error(404, "no such request", "not_found")
        return web.json_response({"id": request.match_info["id"], "state": "finished"})

    async def _cancel(self, request: web.Request) -> web.Response:
        if request.match_info["id"] != "chatcmpl-1/ü":
            return error(404, "no such request", "not_found")
        return web.json_response({"id": request.match_info["id"], "cancelled": 2})

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _ready(self, request: web.Request) -> web.Response:
        return web.Response(status=200 if self.is_ready else 503)


def error(status: int, message: str, code: str | int = "bad", **headers: str) -> web.Response:
    body = {"error": {"message": message, "type": "some_type", "code": code, "param": None}}
    return web.json_response(
        body, status=status, headers={name.replace("_", "-"): value for name, value in headers.items()}
    )


def not_found() -> web.Response:
    """What the endpoint says of an upload that has expired."""
    body = {"error": {"message": "no such picture", "type": "media_not_found", "code": 404, "param": None}}
    return web.json_response(body, status=404)


def complete(*texts: str, logprobs: Any = None) -> Handler:
    """Answer in one piece, with one choice per text."""
    body = {
        "id": "chatcmpl-7",
        "object": "chat.completion",
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "stop",
                "logprobs": logprobs,
            }
            for index, text in reversed(list(enumerate(texts)))
        ],
        "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
    }

    async def answer(request: web.Request) -> web.Response:
        return web.json_response(body)

    return answer


def event(text: str = "", *, index: int = 0, finish: str | None = None, **choice: Any) -> bytes:
    """One SSE event with one chunk."""
    delta = choice.pop("delta", {"content": text})
    choices = [{"index": index, "delta": delta, "finish_reason": finish, **choice}]
    return sse({"id": "chatcmpl-7", "object": "chat.completion.chunk", "choices": choices})


def sse(data: Any) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False).encode() + b"\n\n"


ROLE = event(delta={"role": "assistant", "content": ""})
DONE = b"data: [DONE]\n\n"


def streamed(*pieces: bytes, then: Callable[[web.Request], Awaitable[None]] | None = None) -> Handler:
    """Answer with a stream, written piece by piece, then do something else before it ends."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Request-Id": "req-9"})
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
            await asyncio.sleep(0)
        if then is not None:
            await then(request)
        await response.write_eof()
        return response

    return answer


async def hang(request: web.Request) -> None:
    """Wait for the client to hang up."""
    await asyncio.Event().wait()


async def hang_up(request: web.Request) -> None:
    """Drop the connection without a word."""
    assert request.transport is not None
    request.transport.abort()

"""Why a request failed, and how an HTTP client is told: by a status while there is time, else by an error event.

Lives in the endpoint process; owns nothing. The engine client notes the failure of a request on its HTTP exchange
(a context variable); `ExplicitErrors` then makes the answer say so, whatever vLLM's handlers made of the exception.
Pure ASGI, no vLLM.
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Iterable
from typing import Any

import msgspec
import structlog

from epd.endpoint.http.asgi import App, Message, Receive, Scope, Send
from epd.endpoint.http.exchange import SCOPE_KEY, Exchange, current_exchange
from epd.endpoint.http.keys import owner_of
from epd.errors import ErrorCode

log = structlog.get_logger()

RETRY_AFTER_S = 1.0


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a request ended without an answer.

    `code` is a stable word, `status` the HTTP status, `retry_after_s` > 0 if trying again may help. Ours are made by
    `failure_of` from an `epd.errors.ErrorCode`; only those that others report (vLLM, the broker) are made directly.
    """

    code: str
    message: str
    status: int
    retry_after_s: float = 0.0

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"

    def body(self, path: str) -> dict[str, Any]:
        """The JSON body in the shape that clients of `path` expect: Anthropic's on /v1/messages, else OpenAI's.

        As in vLLM, `code` is the HTTP status; the stable word is `type`.
        """
        if is_anthropic(path):
            return {"type": "error", "error": {"type": _OWN_WORDS.get(self.code, self.code), "message": self.message}}
        error = {"message": self.message, "type": self.code, "param": None, "code": self.status}
        return {"error": error}

    def event(self, path: str) -> bytes:
        """The server-sent event that ends a stream of `path` that has begun."""
        if is_anthropic(path):
            return f"event: error\ndata: {json.dumps(self.body(path))}\n\n".encode()
        if path.startswith("/v1/responses"):
            data = {"type": "error", "code": self.code, "message": self.message, "param": None}
            return f"event: error\ndata: {json.dumps(data)}\n\n".encode()
        return f"data: {json.dumps(self.body(path))}\n\n".encode()


def failure_of(code: ErrorCode, message: str, retry_after_s: float = RETRY_AFTER_S) -> Failure:
    """A failure with its code's status; `retry_after_s` is told if trying again may help."""
    return Failure(code=code, message=message, status=code.status, retry_after_s=retry_after_s if code.retry else 0.0)


# Anthropic's own words for common errors.
_OWN_WORDS: dict[str, str] = {ErrorCode.UNAUTHORIZED: "authentication_error"}
_WORDS_BY_STATUS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
# What vLLM's handlers write when a stream fails, in the three APIs.
_ERROR_EVENTS = (b"event: error", b'data: {"error"')
_NAME_BYTES = 8
_OF_BODY = frozenset({b"content-type", b"content-length"})
_OWN_HEADERS = _OF_BODY | {b"retry-after", b"cache-control"}


def is_anthropic(path: str) -> bool:
    """Whether the clients of `path` expect Anthropic's JSON."""
    return path.startswith("/v1/messages")


async def send_failure(send: Send, path: str, failure: Failure, kept: Iterable[tuple[bytes, bytes]] = ()) -> None:
    """Answers with `failure` as a whole response; `kept` are the headers of the response that it replaces."""
    body = json.dumps(failure.body(path)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name, value) for name, value in kept if name.lower() not in _OWN_HEADERS]
    if failure.retry_after_s > 0:
        headers.append((b"retry-after", str(math.ceil(failure.retry_after_s)).encode()))
    await send({"type": "http.response.start", "status": failure.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class ExplicitErrors:
    """ASGI middleware: answers a failed request with its status, or with an error event once a stream has begun.

    vLLM answers every stream with 200 and puts whatever happens later into the stream. Here the start of an event
    stream is held back until its first bytes, so that a failure before them can still be a status.

    Args:
        app: the application.
        has_keys: whether clients have API keys.
    """

    def __init__(self, app: App, *, has_keys: bool = False) -> None:
        self._app, self._has_keys = app, has_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the application with its own `Exchange`."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(owner_of(scope, has_keys=self._has_keys), _named(scope))
        scope[SCOPE_KEY] = exchange
        answer = _Answer(scope["path"].removeprefix(scope.get("root_path", "")), send, exchange)
        token = current_exchange.set(answer.exchange)
        try:
            await self._app(scope, receive, answer.send)
        except Exception as error:
            if not answer.can_explain():
                raise
            log.warning("a stream was ended by an exception", path=answer.path, error=repr(error))
            await answer.explain()
        finally:
            current_exchange.reset(token)


def _named(scope: Scope) -> str:
    """The request's `X-Request-Id`; without one it gets one, from which vLLM then makes its ids."""
    given: bytes = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    if not given:
        given = secrets.token_hex(_NAME_BYTES).encode()
        others = [each for each in scope["headers"] if each[0] != b"x-request-id"]
        scope["headers"] = [*others, (b"x-request-id", given)]
    return given.decode("latin-1")


def in_anthropics_shape(status: int, body: bytes) -> bytes:
    """An error's body as Anthropic's clients read it; left as it is if it has that shape already."""
    try:
        told = json.loads(body)
    except ValueError:
        told = body.decode("utf-8", "replace")
    if isinstance(told, dict) and told.get("type") == "error" and isinstance(told.get("error"), dict):
        return body
    said = told.get("error", told.get("detail", told)) if isinstance(told, dict) else told
    message = said.get("message", said) if isinstance(said, dict) else said
    word = _WORDS_BY_STATUS.get(status, "invalid_request_error" if status < 500 else "api_error")
    text = message if isinstance(message, str) else json.dumps(message)
    return json.dumps({"type": "error", "error": {"type": word, "message": text}}).encode()


class _Answer:
    """What was sent of one response; `replaced` once ours takes the place of the application's."""

    def __init__(self, path: str, send: Send, exchange: Exchange) -> None:
        self.path, self._send, self.exchange = path, send, exchange
        self._held: Message | None = None
        self._error: list[bytes] | None = None  # the parts of an error that is to be told in another shape
        self._is_stream = self._ended = self._replaced = False

    async def send(self, message: Message) -> None:
        if self._replaced:
            return
        if message["type"] == "http.response.start":
            await self._start(message)
        elif message["type"] == "http.response.body":
            await self._body(message)
        else:
            await self._send(message)

    async def _start(self, message: Message) -> None:
        if message["status"] >= 400 and self.exchange.failure is not None:
            await self._replace(self.exchange.failure, message)
            return
        content_types = [v for k, v in message.get("headers", ()) if k.lower() == b"content-type"]
        self._is_stream = bool(content_types) and content_types[0].startswith(b"text/event-stream")
        if self._is_stream:
            self._held = message
        elif message["status"] >= 400 and is_anthropic(self.path):
            self._held, self._error = message, []
        else:
            await self._send(message)

    async def _body(self, message: Message) -> None:
        body = bytes(message.get("body", b""))
        if self._held is not None and self._error is not None:
            self._error.append(body)
            if not message.get("more_body", False):
                await self._reshape(self._held, b"".join(self._error))
            return
        if self._held is not None:
            if not body and message.get("more_body", False):
                return
            failure = self.exchange.failure or _first_error(body)
            if failure is not None:
                await self._replace(failure, self._held)
                return
            start, self._held = self._held, None
            await self._send(start)
        elif self._is_stream and self.exchange.failure is not None and body.startswith(_ERROR_EVENTS):
            body = self.exchange.failure.event(self.path)
        self._ended = not message.get("more_body", False)
        await self._send({**message, "body": body})

    async def _reshape(self, start: Message, body: bytes) -> None:
        self._held, self._replaced = None, True
        body = in_anthropics_shape(start["status"], body)
        kept = [(name, value) for name, value in start.get("headers", ()) if name.lower() not in _OF_BODY]
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *kept]
        await self._send({**start, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})

    async def _replace(self, failure: Failure, start: Message) -> None:
        self._held, self._replaced = None, True
        await send_failure(self._send, self.path, failure, start.get("headers", ()))

    def can_explain(self) -> bool:
        """Whether the application's exception leaves an event stream open."""
        return self._is_stream and not self._ended and not self._replaced

    async def explain(self) -> None:
        """Ends the stream, or what was to become one, with the reason."""
        failure = self.exchange.failure or failure_of(ErrorCode.ENGINE_FAILED, "internal server error")
        if self._held is not None:
            await self._replace(failure, self._held)
            return
        await self._send({"type": "http.response.body", "body": failure.event(self.path), "more_body": False})


def _first_error(body: bytes) -> Failure | None:
    """The error that vLLM put into a stream as its first event, if `body` is one."""
    if not body.startswith(b'data: {"error"'):
        return None
    try:
        error = json.loads(body[len(b"data: ") :].split(b"\n", 1)[0])["error"]
        status = int(error["code"])
        if not 400 <= status < 600:
            return None
        return Failure(code=str(error["type"]), message=str(error["message"]), status=status)
    except (ValueError, KeyError, TypeError):
        return None

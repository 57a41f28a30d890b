"""Input that makes vLLM's handlers raise where they should refuse it: answered with 400, not as a server error.

Lives in the endpoint process, as the innermost ASGI middleware. One of Python's own exceptions, before anything was
submitted and any byte of the answer was sent, comes from parsing or rendering what the client sent, such as a tool call
that is not an object. It is logged with its place, so that a bug of ours does not hide here.
"""

from __future__ import annotations

import json
import traceback

import structlog

from epd.endpoint.http.asgi import App, Message, Receive, Scope, Send
from epd.endpoint.http.exchange import current_exchange
from epd.endpoint.http.failures import failure_of, send_failure
from epd.errors import ErrorCode

log = structlog.get_logger()

# What code raises that takes one kind of value for another; not what the system or its memory causes.
_BY_INPUT = (ArithmeticError, AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


class UnreadableInput:
    """ASGI middleware that answers for handlers that fail on their input."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the application; answers 400 if it raises because of what it was sent."""
        exchange = current_exchange.get()
        if scope["type"] != "http" or exchange is None:
            await self._app(scope, receive, send)
            return
        has_answered = False

        async def noted(message: Message) -> None:
            nonlocal has_answered
            has_answered = True
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except _BY_INPUT as error:
            if has_answered or exchange.has_submitted:
                raise
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            place = traceback.extract_tb(error.__traceback__)[-1]
            log.warning(
                "input that cannot be read", path=path, error=repr(error), at=f"{place.filename}:{place.lineno}"
            )
            text = f"the request cannot be read: {type(error).__name__}: {str(error)[:200]}"
            await send_failure(send, path, failure_of(ErrorCode.INVALID_REQUEST, text))


def unreadable_body(path: str, reason: str) -> bytes:
    """The JSON that refuses a body that is not what its headers say."""
    text = " ".join((reason.partition("message:")[2] or reason).split())  # aiohttp puts a status in front
    failure = failure_of(ErrorCode.INVALID_BODY, f"the body cannot be read: {text[:200]}")
    return json.dumps(failure.body(path)).encode()

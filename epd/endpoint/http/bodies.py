"""Bounds the memory that all request bodies take together: a request that finds it full is told to come back.

Lives in the endpoint process, as an ASGI middleware around the limits of single requests. A body counts from its first
byte to the end of its exchange, since its handler may keep it. Pure ASGI, no vLLM.
"""

from __future__ import annotations

from epd.endpoint.http.asgi import App, Message, Receive, Scope, Send
from epd.endpoint.http.failures import failure_of, send_failure
from epd.errors import ErrorCode


class _FullError(Exception):
    """There is no room for the rest of this body."""


class Bodies:
    """ASGI middleware that counts the bytes of all bodies under way.

    Args:
        app: what to call.
        max_bytes: of all bodies together.
    """

    def __init__(self, app: App, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes
        self.num_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the application, or answers 503 if its body would be too much."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        taken, has_answered = 0, False

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            size = len(message.get("body", b""))
            taken += size
            self.num_bytes += size
            if size and self.num_bytes > self._max_bytes:
                raise _FullError
            return message

        async def noted(message: Message) -> None:
            nonlocal has_answered
            has_answered = True
            await send(message)

        declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
        try:
            if declared.isdigit() and int(declared) and self.num_bytes + int(declared) > self._max_bytes:
                raise _FullError
            await self._app(scope, counted, noted)
        except _FullError:
            if has_answered:
                raise
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            text = f"the bodies of current requests already take {self.num_bytes} bytes"
            await send_failure(send, path, failure_of(ErrorCode.OVERLOADED, text))
        finally:
            self.num_bytes -= taken

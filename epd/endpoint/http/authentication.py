"""Who may ask: API keys, as OpenAI's clients send them (`Authorization: Bearer`) and as Anthropic's do (`x-api-key`).

Lives in the endpoint process; owns nothing. Pure ASGI, in front of everything else, which then sees only one form of
key.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Iterator

from epd.endpoint.http.asgi import App, Receive, Scope, Send
from epd.endpoint.http.failures import failure_of, send_failure
from epd.errors import ErrorCode

# What anyone may read, even if the server asks for keys.
_OPEN_PATHS = frozenset({"/health", "/ready", "/metrics", "/debug/held", "/ping", "/version", "/load"})
_REFUSED = failure_of(ErrorCode.UNAUTHORIZED, "missing or wrong API key")


class ApiKeys:
    """ASGI middleware: asks for a key on every path except those of monitoring; vLLM guards only /v1 and the like.

    Args:
        app: the application; it gets the key as a bearer token, whichever way it came.
        keys: the valid ones.
    """

    def __init__(self, app: App, keys: Iterable[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers 401 or runs the application."""
        if scope["type"] != "http" or scope["method"] == "OPTIONS":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        key = next((key for key in _keys_of(scope) if self._is_known(key)), None)
        if key is not None:
            others = [each for each in scope["headers"] if each[0] not in (b"authorization", b"x-api-key")]
            scope["headers"] = [*others, (b"authorization", b"Bearer " + key)]
        elif path not in _OPEN_PATHS:
            await send_failure(send, path, _REFUSED, [(b"www-authenticate", b"Bearer")])
            return
        await self._app(scope, receive, send)

    def _is_known(self, key: bytes) -> bool:
        digest = _digest(key)
        return any([secrets.compare_digest(digest, each) for each in self._digests])  # all, so that time tells nothing


def _keys_of(scope: Scope) -> Iterator[bytes]:
    for name, value in scope["headers"]:
        if name == b"x-api-key":
            yield value.strip()
        elif name == b"authorization":
            scheme, _, key = value.partition(b" ")
            if scheme.lower() == b"bearer":
                yield key.strip()


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()

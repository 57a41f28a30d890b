"""One line in the log for each request: who asked for what, how it ended, what it took, and who worked on it.

Lives in the endpoint process; owns nothing. Pure ASGI, in front of everything, so that refusals are logged too.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from typing import Any

import structlog

from epd.endpoint.http.asgi import App, Message, Receive, Scope, Send
from epd.endpoint.http.exchange import SCOPE_KEY, Exchange, Part
from epd.endpoint.ops.stories import IN_FLIGHT, RequestStory, Stories

log = structlog.get_logger()

# What monitoring asks for every few seconds.
WATCHED_PATHS = frozenset({"/health", "/ready", "/metrics", "/ping", "/version", "/load", "/debug/held"})
_LEFT = 499
_MAX_NAMED = 4


class RequestLog:
    """ASGI middleware: logs each exchange when it has ended.

    Args:
        app: the application.
        stories: says which workers a request had.
        silent_paths: requests to these are not logged.
    """

    def __init__(self, app: App, stories: Stories, silent_paths: Iterable[str] = WATCHED_PATHS) -> None:
        self._app, self._stories, self._silent = app, stories, frozenset(silent_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began_at, status, left, complete = time.monotonic(), 0, False, False

        async def watched(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = int(message["status"])
            elif not left:
                complete = not message.get("more_body", False)
            await send(message)

        async def received() -> Message:
            nonlocal left
            message = await receive()
            left = left or (message["type"] == "http.disconnect" and not complete)
            return message

        try:
            await self._app(scope, received, watched)
        finally:
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            status = _LEFT if left else status or 500
            if path not in self._silent:
                exchange = scope.get(SCOPE_KEY) or Exchange()
                told = [each for each in map(self._stories.get, (p.request_id for p in exchange.parts)) if each]
                line = describe(exchange, told, took_s=time.monotonic() - began_at, left=left)
                log.info("request", id=line.pop("id"), method=scope["method"], path=path, status=status, **line)


def describe(exchange: Exchange, told: Sequence[RequestStory], *, took_s: float, left: bool = False) -> dict[str, Any]:
    """What is logged of an exchange besides its address and status; times in seconds from its beginning.

    Args:
        exchange: an ended one.
        told: the stories of its parts.
        took_s: seconds until its end.
        left: whether its client had gone before.
    """
    parts = exchange.parts
    line: dict[str, Any] = {"id": _named(part.client_id for part in parts) or exchange.name, "took_s": round(took_s, 4)}
    if parts:
        first_at = min((part.first_at for part in parts if part.first_at), default=0.0)
        # Several choices share their prompt; several prompts have their own ids.
        prompts = list({part.client_id: part for part in parts}.values())
        line |= {
            "ttft_s": round(first_at - exchange.began_at, 4) if first_at else None,
            "prompt_tokens": sum(part.num_prompt_tokens for part in prompts),
            "cached_tokens": sum(max(0, part.num_cached_tokens) for part in prompts),
            "output_tokens": sum(part.num_output_tokens for part in parts),
            "patches": _num_patches(prompts),
            "workers": _named((event.worker for each in told for event in each.events if event.worker), 64),
            "ended": _named(f"{each.state}: {each.detail}" for each in told if each.state != IN_FLIGHT),
        }
    if exchange.failure is not None:
        line |= {"error": exchange.failure.code, "reason": exchange.failure.message}
    if left:
        line["client_left"] = True
    return line


def _num_patches(parts: Iterable[Part]) -> int:
    return sum(part.num_patches for part in parts)


def _named(names: Iterable[str], most: int = _MAX_NAMED) -> str:
    """Names without repetition, but not more than people read."""
    found = list(dict.fromkeys(names))
    return ",".join(found[:most]) + (f",+{len(found) - most}" if len(found) > most else "")


def quiet_refusals(*kinds: type[Exception]) -> None:
    """Keeps tracebacks of requests that are refused or fail for a known reason out of the log: their line says it.

    Args:
        kinds: the exceptions with which such requests end.
    """

    def is_news(record: logging.LogRecord) -> bool:
        return not isinstance(record.exc_info[1] if record.exc_info else None, kinds)

    for handler in logging.getLogger().handlers:
        handler.addFilter(is_news)

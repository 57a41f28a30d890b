"""Clocks, translated transport errors, and the reader of one streamed answer.

Lives in the user's process, on the client's event loop. ``AnswerReader`` owns one HTTP response and
closes it; nothing here owns a task.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import NamedTuple

import aiohttp

from epd.client.errors import (
    ConnectFailed,
    ConnectTimeout,
    FirstTokenTimeout,
    StreamInterrupted,
    Timeout,
    TokenTimeout,
    TotalTimeout,
    api_error,
)
from epd.client.sse import EventParser, EventTooLong
from epd.client.types import Chunk, Timeouts, read_json

__all__ = [
    "AnswerReader",
    "Limit",
    "first_token_limit",
    "total_limit",
    "transport_errors",
    "until",
]

_REUSE_WAIT_S = 0.2  # how long a finished stream may take to end before its connection is dropped


class Limit(NamedTuple):
    """A moment on the event loop's clock, and what to raise then."""

    at: float
    error: type[Timeout]
    message: str


@contextlib.asynccontextmanager
async def until(limit: Limit, request_id: str | None = None) -> AsyncIterator[None]:
    """Run the block until the limit, then cancel it and raise the limit's error."""
    try:
        async with asyncio.timeout_at(limit.at):
            yield
    except Timeout:  # a TimeoutError too, but a more precise one
        raise
    except TimeoutError as error:
        raise limit.error(limit.message, request_id=request_id) from error


@contextlib.contextmanager
def transport_errors(base_url: str, timeouts: Timeouts, request_id: str | None = None) -> Iterator[None]:
    """Raise aiohttp's transport errors as this client's; use it inside ``until``, whose errors are OSErrors."""
    try:
        yield
    except aiohttp.ConnectionTimeoutError as error:
        raise ConnectTimeout(f"no connection to {base_url} within {timeouts.connect_s:g} s (connect_s)") from error
    except aiohttp.ClientConnectorError as error:
        raise ConnectFailed(f"cannot connect to {base_url}: {_why(error)}") from error
    except (aiohttp.ClientError, OSError) as error:
        raise StreamInterrupted(
            f"the connection to {base_url} broke before the answer was complete: {error!r}",
            request_id=request_id,
        ) from error


def _why(error: aiohttp.ClientConnectorError) -> str:
    """Say it as the system does: asyncio's text for a refused connection is made for programmers."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return str(error.certificate_error)
    number = error.os_error.errno
    return os.strerror(number) if number and number > 0 else error.os_error.strerror or str(error.os_error)


class AnswerReader:
    """Reads a streamed chat completion, event by event, against the clocks.

    Args:
        response: A response with status 200; closed by ``close``.
        base_url: For messages.
        timeouts: The clocks.
        sent_at: When the request was sent, on the event loop's clock.
        num_choices: How many choices must finish for a stream without ``[DONE]`` to be complete.
    """

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        *,
        base_url: str,
        timeouts: Timeouts,
        sent_at: float,
        num_choices: int,
    ) -> None:
        self._response = response
        self._base_url = base_url
        self._timeouts = timeouts
        self._sent_at = sent_at
        self._num_choices = num_choices
        self._request_id = response.headers.get("X-Request-Id")
        self._parser = EventParser()
        self._ready: deque[str] = deque()
        self._finished: set[int] = set()
        self._has_token = False

    async def next_chunks(self) -> list[Chunk] | None:
        """Return the chunks of the next event, or None when the answer is complete.

        Raises:
            APIError: The server sent an error object.
            FirstTokenTimeout, TokenTimeout, TotalTimeout: A clock ran out.
            StreamInterrupted: The stream ended too early or is not a chat completion.
        """
        data = await self._next_data()
        if data is None:
            if len(self._finished) >= self._num_choices:
                return None
            raise self._interrupted("the stream ended before the answer did")
        if data == "[DONE]":
            await self._let_end()
            return None
        try:
            event = read_json(data)
            if not isinstance(event, dict):
                raise ValueError("an event is not a JSON object")
            if event.get("error"):
                raise api_error(None, event, request_id=self._request_id)
            chunks = Chunk.all_from_json(event)
        except ValueError as error:
            raise self._interrupted(f"the stream is not a chat completion: {error}") from error
        self._request_id = event.get("id") or self._request_id
        self._has_token = self._has_token or bool(chunks)
        self._finished.update(chunk.index for chunk in chunks if chunk.finish_reason is not None)
        return chunks

    def close(self) -> None:
        """Close the connection unless the whole answer was read; the server then cancels the request."""
        self._response.close()

    async def _next_data(self) -> str | None:
        """Return the data of the next event, or None at the end of the stream."""
        limit = self._limit()  # comments that keep the connection alive do not move it
        while not self._ready:
            async with until(limit, self._request_id):
                with transport_errors(self._base_url, self._timeouts, self._request_id):
                    piece = await self._response.content.readany()
            if not piece:
                return None
            try:
                self._ready.extend(event.data for event in self._parser.feed(piece))
            except EventTooLong as error:
                raise self._interrupted(str(error)) from error
        return self._ready.popleft()

    def _limit(self) -> Limit:
        clocks = self._timeouts
        if self._has_token:
            at = asyncio.get_running_loop().time() + clocks.token_s
            message = f"no further token within {clocks.token_s:g} s (token_s)"
            token = Limit(at, TokenTimeout, message)
        else:
            token = first_token_limit(clocks, self._sent_at)
        return min(token, total_limit(clocks, self._sent_at), key=lambda limit: limit.at)

    async def _let_end(self) -> None:
        """Wait a moment for the end of the body, so that the connection can be reused."""
        with contextlib.suppress(aiohttp.ClientError, OSError):
            async with asyncio.timeout(_REUSE_WAIT_S):
                while await self._response.content.readany():
                    pass

    def _interrupted(self, message: str) -> StreamInterrupted:
        return StreamInterrupted(message, request_id=self._request_id)


def first_token_limit(clocks: Timeouts, sent_at: float) -> Limit:
    """Return when a request sent at that time must have its first token."""
    message = f"no first token within {clocks.first_token_s:g} s (first_token_s)"
    return Limit(sent_at + clocks.first_token_s, FirstTokenTimeout, message)


def total_limit(clocks: Timeouts, sent_at: float) -> Limit:
    """Return when a request sent at that time must be complete."""
    message = f"the call took longer than {clocks.total_s:g} s (total_s)"
    return Limit(sent_at + clocks.total_s, TotalTimeout, message)

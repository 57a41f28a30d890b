"""Bounds the memory that all decoded media take together: a request that finds it full waits for its turn.

Lives in the endpoint process, on its event loop; owns the count. A medium counts with what it takes when
decoded: three bytes a pixel, four a sample. The request that began first never waits, so that two requests that each
hold a part of their media cannot wait for each other. So one request's share may exceed the bound.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import structlog

from epd.endpoint.http.refusals import RefusedError
from epd.errors import ErrorCode

log = structlog.get_logger()

_WAIT_S = 60.0


class Share:
    """One request's share of the budget.

    Attributes:
        num_asked: the bytes of all its media so far, decoded or not.
        taken: the bytes of the media that it holds, by their names.
    """

    def __init__(self) -> None:
        self.num_asked = 0
        self.taken: dict[int, int] = {}
        self.waiting: asyncio.Future[None] | None = None


class Budget:
    """The bytes of decoded media of all requests.

    Args:
        max_bytes: the limit for all together, except what the oldest request needs.
        max_request_bytes: the limit for one request.
        wait_s: how long a request waits for its turn.
    """

    def __init__(self, max_bytes: int, max_request_bytes: int, wait_s: float = _WAIT_S) -> None:
        self._max_bytes, self._max_request_bytes, self._wait_s = max_bytes, max_request_bytes, wait_s
        self._shares: dict[Share, None] = {}  # in the order in which they began
        self.num_bytes = 0

    @contextmanager
    def share(self) -> Iterator[Share]:
        """The share of a request; on exit it gives back all that it holds."""
        share = Share()
        token = current_share.set(share)
        try:
            yield share
        finally:
            current_share.reset(token)
            for name in list(share.taken):
                self.give_back(share, name)
            self._shares.pop(share, None)
            self._wake()

    def ask(self, share: Share, num_bytes: int) -> None:
        """Notes that a request has a medium of this size when decoded.

        Raises:
            RefusedError: that is more than one request may have.
        """
        share.num_asked += num_bytes
        check_request(share.num_asked, self._max_request_bytes)

    async def take(self, share: Share, name: int, num_bytes: int) -> None:
        """Waits until that many bytes may be decoded for a request; `name` is for giving them back.

        Raises:
            RefusedError: it has waited for too long; HTTP 503.
        """
        self._shares.setdefault(share)
        deadline = asyncio.get_running_loop().time() + self._wait_s
        while self.num_bytes + num_bytes > self._max_bytes and next(iter(self._shares)) is not share:
            share.waiting = share.waiting or asyncio.get_running_loop().create_future()
            try:
                async with asyncio.timeout_at(deadline):
                    await asyncio.shield(share.waiting)
            except TimeoutError:
                text = f"the media of other requests already take {self.num_bytes} bytes"
                raise RefusedError(ErrorCode.OVERLOADED, text) from None
        share.taken[name] = share.taken.get(name, 0) + num_bytes
        self.num_bytes += num_bytes

    def settle(self, share: Share, ticket: object, medium: Any) -> Any:
        """Corrects what was taken under the name of `ticket` to what `medium` really takes; returns that.

        Raises:
            RefusedError: it turns out to be more than one request may have.
        """
        taken = share.taken.pop(id(ticket), 0)
        if (more := _size_of(medium) - taken) > 0:
            self.num_bytes += more
            taken += more
            share.taken[id(medium)] = taken
            self.ask(share, more)
        share.taken[id(medium)] = taken
        return medium

    def give_back(self, share: Share, name: int) -> int:
        """Frees what was taken under `name`; returns how much that was."""
        num_bytes = share.taken.pop(name, 0)
        self.num_bytes -= num_bytes
        if num_bytes:
            self._wake()
        return num_bytes

    def _wake(self) -> None:
        for share in self._shares:
            if share.waiting is not None:
                share.waiting.set_result(None)
                share.waiting = None


def _size_of(medium: Any) -> int:
    """The bytes of a video's frames; 0 for media that tell their size before they are decoded."""
    content = getattr(medium, "media", None) if not isinstance(medium, tuple) else None
    return int(getattr(content[0], "nbytes", 0)) if isinstance(content, tuple) else 0


def check_request(num_bytes: int, most: int) -> None:
    """Checks how much all media of one request take when decoded.

    Raises:
        RefusedError: too much.
    """
    if num_bytes > most:
        text = f"the media of the request take {num_bytes} bytes or more when decoded; at most {most} are accepted"
        raise RefusedError(ErrorCode.MEDIA_TOO_LARGE, text)


# The share of the request that is being handled.
current_share: contextvars.ContextVar[Share | None] = contextvars.ContextVar("share", default=None)

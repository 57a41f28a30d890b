"""Questions to the broker that may go unanswered: who waits for which answer, and for how long.

Lives in the endpoint process; owns the waiters' futures. Pure but for asyncio.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

TIMEOUT_S = 2.0


class Questions(Generic[T]):
    """Waits for answers by key; one answer serves all waiters under its key."""

    def __init__(self) -> None:
        self._waiters: dict[str, list[asyncio.Future[T]]] = {}

    async def ask(self, key: str, send: Callable[[], object]) -> T | None:
        """Calls `send` and returns the answer to `key`, or None if none comes within `TIMEOUT_S`."""
        waiter: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        (waiters := self._waiters.setdefault(key, [])).append(waiter)
        try:
            send()
            return await asyncio.wait_for(waiter, TIMEOUT_S)
        except TimeoutError:
            return None
        finally:
            if waiter in waiters:
                waiters.remove(waiter)
            if not waiters and self._waiters.get(key) is waiters:
                del self._waiters[key]

    def answer(self, key: str, value: T) -> None:
        """Gives `value` to all waiters under `key`."""
        for waiter in self._waiters.pop(key, []):
            if not waiter.done():
                waiter.set_result(value)

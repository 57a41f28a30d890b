"""Threads for what may take too long: a call that does is given up, and another thread replaces its own.

Lives in the endpoint process; owns the threads. A thread cannot be ended from outside, so one whose call was given up
is left alone, takes no further calls and ends with its call, if that ever ends; the number of such threads is bounded.
The
threads are daemons: none of them keeps the process from ending. Pure asyncio and threads, no vLLM.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Any

import structlog

log = structlog.get_logger()


class OverdueError(Exception):
    """A call has taken longer than it may."""


class StuckError(Exception):
    """So many calls were given up and are still running that no further ones are begun."""


class _Call:
    def __init__(self, function: Callable[[], Any], timeout_s: float, loop: asyncio.AbstractEventLoop) -> None:
        self.function, self.timeout_s, self.loop = function, timeout_s, loop
        self.result: asyncio.Future[Any] = loop.create_future()
        self.timer: asyncio.TimerHandle | None = None
        self.ended = self.given_up = False  # whichever is first, decided under the lane's lock


class Lane:
    """`num_threads` threads that take calls one after the other; they are started as needed.

    Args:
        name: the name of its threads.
        num_threads: how many take calls.
        max_stuck: how many calls that were given up may still be running.
    """

    def __init__(self, name: str, num_threads: int, max_stuck: int = 16) -> None:
        self._name, self._num_threads, self._max_stuck = name, num_threads, max_stuck
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._num_idle = self._num_running = 0
        self._lock = threading.Lock()
        self.num_stuck = 0

    async def run(self, function: Callable[..., Any], *args: Any, timeout_s: float) -> Any:
        """The result of `function(*args)`, which runs in one of the threads; waiting for its turn does not count.

        Raises:
            OverdueError: it has run for `timeout_s`; it may go on, but nobody will look at its result.
            StuckError: too many are in that state; it was not begun.
        """
        if self.num_stuck >= self._max_stuck:
            raise self._stuck()
        call = _Call(lambda: function(*args), timeout_s, asyncio.get_running_loop())
        self._calls.put(call)
        with self._lock:
            wanted = self._calls.qsize() > self._num_idle and self._num_running < self._num_threads
            self._num_running += wanted
        if wanted:
            self._start()
        return await call.result

    def close(self) -> None:
        """Ends the threads once waiting calls are done."""
        for _ in range(self._num_running):
            self._calls.put(None)

    def _stuck(self) -> StuckError:
        return StuckError(f"{self.num_stuck} calls of {self._name} do not end")

    def _start(self) -> None:
        threading.Thread(target=self._work, name=self._name, daemon=True).start()

    def _work(self) -> None:
        while True:
            with self._lock:
                self._num_idle += 1
            call = self._calls.get()
            with self._lock:
                self._num_idle -= 1
            if call is None:
                return
            if call.result.cancelled():
                continue
            if self.num_stuck >= self._max_stuck:  # by now
                _tell(call, self._ended, call, None, self._stuck())
                continue
            if not _tell(call, self._begun, call):
                continue
            result, error = None, None
            try:
                result = call.function()
            except BaseException as caught:
                error = caught
            call.function = None  # type: ignore[assignment]  # it holds what it was given
            with self._lock:
                call.ended, given_up = True, call.given_up
            _tell(call, self._ended, call, result, error)
            call = result = error = None
            if given_up:  # another thread has replaced this one
                return

    # ---- on the event loop

    def _begun(self, call: _Call) -> None:
        call.timer = call.loop.call_later(call.timeout_s, self._give_up, call)

    def _ended(self, call: _Call, result: Any, error: BaseException | None) -> None:
        if call.given_up:
            self.num_stuck -= 1
            return
        if call.timer is not None:
            call.timer.cancel()
        if call.result.done():  # nobody waits any more
            return
        if error is not None:
            call.result.set_exception(error)
        else:
            call.result.set_result(result)

    def _give_up(self, call: _Call) -> None:
        with self._lock:
            if call.ended:  # just now; its result is on its way
                return
            call.given_up = True
        self.num_stuck += 1
        log.warning("a call is given up", lane=self._name, after_s=call.timeout_s, num_stuck=self.num_stuck)
        if not call.result.done():
            call.result.set_exception(OverdueError(f"it took longer than {call.timeout_s:g} s"))
        self._start()


def _tell(call: _Call, callback: Callable[..., None], *args: Any) -> bool:
    """Makes the event loop call back; false if it has ended."""
    try:
        call.loop.call_soon_threadsafe(callback, *args)
    except RuntimeError:
        return False
    return True

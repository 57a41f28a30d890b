"""Pools of other hosts: the cache daemon that owns them fetches and stores their slots, over TCP.

Lives in workers on other hosts; `cache.pools.server` is the other side and describes the messages. A view has its own
thread, which owns its socket: slots travel while the engine goes on, many at a time.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import queue
import threading
import time
from concurrent.futures import Future
from typing import Any

import msgspec
import zmq

from cache import slot as slots
from cache.pools.base import PoolError
from cache.pools.server import MAX_SLOTS_WAITING, Answer, Ask
from cache.slot import StaleSlotError
from epd.messages import Pool, Slot
from epd.transport.factory import SocketFactory

# Counted from the last sign of life of a host that owes an answer.
TIMEOUT_S = 2.0
_CLOSE_S = 5.0

_answers = msgspec.msgpack.Decoder(Answer)


@dataclasses.dataclass(slots=True, eq=False)
class _Question:
    """A slot to fetch, or to store `data` in; `done` gets the slot's data, or None when it is stored."""

    slot: Slot
    data: Any = None
    owner: str = ""
    done: Future[Any] = dataclasses.field(default_factory=Future)
    asked_at: float = 0.0

    def fail(self, error: Exception) -> None:
        """Ends the question; for a fetch, the slots of a host that does not answer are stale."""
        if self.data is None and not isinstance(error, StaleSlotError):
            error = StaleSlotError(str(error))
        self.done.set_exception(error)


class RemoteView:
    """A pool of another host, to read and write. Any thread may call its methods.

    Args:
        pool: the pool; it has an `address`.
        timeout_s: how long a host that owes an answer may be silent.
    """

    def __init__(self, pool: Pool, *, timeout_s: float = TIMEOUT_S) -> None:
        self._pool, self._timeout_s = pool, timeout_s
        self._asked: queue.SimpleQueue[_Question | None] = queue.SimpleQueue()
        self._wake = -1
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = False

    @property
    def pool(self) -> Pool:
        """The pool it shows."""
        return self._pool

    def store(self, slot: Slot, data: bytes | bytearray | memoryview, owner: str) -> Future[None]:
        """Stores a slot, as `cache.slot.write` does; readers may use it once the future is done. Never blocks.

        `data` must not change until then. The future raises:
            ValueError: `data` or `owner` does not fit the slot, or the slot does not fit the pool.
            StaleSlotError: the pool is gone.
            PoolError: its host does not answer; the slot may have been written nevertheless.
        """
        return self._ask(_Question(slot, data, owner))

    def fetch(self, slot: Slot) -> Future[memoryview]:
        """Fetches a slot's data, copied and verified, as `cache.slot.read` does. Never blocks.

        The future raises StaleSlotError: the slot holds something else, or its host does not answer.
        """
        return self._ask(_Question(slot))

    def write(self, slot: Slot, data: bytes | bytearray | memoryview, owner: str) -> None:
        """Stores a slot and waits until it is stored; raises what `store` does."""
        self.store(slot, data, owner).result()

    def read(self, slot: Slot) -> memoryview:
        """Fetches a slot and waits for it; raises what `fetch` does."""
        return self.fetch(slot).result()

    def settle(self) -> int:
        """Nothing to note: the future of `store` says when a write is done."""
        return 0

    def close(self) -> None:
        """Ends what is under way, and the thread. Closing twice is fine."""
        with self._lock:
            self._closed, thread, self._thread = True, self._thread, None
            if thread is None:
                return
            self._asked.put(None)
            os.eventfd_write(self._wake, 1)
        thread.join(_CLOSE_S)

    def _ask(self, question: _Question) -> Future[Any]:
        with self._lock:
            if self._closed:
                question.fail(PoolError(f"the view of pool {self._pool.pool_id} is closed"))
                return question.done
            if self._thread is None:
                self._wake = os.eventfd(0, os.EFD_CLOEXEC)
                name = f"pool-{self._pool.host}"[:15]
                self._thread = threading.Thread(target=self._run, args=(self._wake,), name=name, daemon=True)
                self._thread.start()
            self._asked.put(question)
            os.eventfd_write(self._wake, 1)
        return question.done

    def _run(self, wake: int) -> None:
        """The thread's body."""
        exchange = _Exchange(self._pool, self._timeout_s)
        try:
            while True:
                if exchange.wait(wake):
                    os.eventfd_read(wake)
                    while not self._asked.empty():
                        if (question := self._asked.get()) is None:
                            return
                        exchange.ask(question)
                exchange.collect()
        finally:
            exchange.close()
            os.close(wake)


class _Exchange:
    """The conversation with one host, in the thread of a view; owns the socket."""

    def __init__(self, pool: Pool, timeout_s: float) -> None:
        self._pool, self._timeout_s = pool, timeout_s
        self._sockets = SocketFactory()
        self._socket: zmq.Socket[bytes] | None = None
        self._numbers = itertools.count(1)
        self._open: dict[int, _Question] = {}  # in the order of asking, which is that of the answers
        self._heard_at = 0.0

    def wait(self, wake: int) -> bool:
        """Blocks until there is something to do; returns whether `wake` has fired."""
        poller = zmq.Poller()
        poller.register(wake, zmq.POLLIN)
        if self._socket is not None:
            poller.register(self._socket, zmq.POLLIN)
        timeout_ms = None
        if self._open:
            timeout_ms = max(0, round((self._silent_at() - time.monotonic()) * 1000) + 1)
        return any(what == wake for what, _ in poller.poll(timeout_ms))

    def ask(self, question: _Question) -> None:
        """Sends a question."""
        stores = question.data is not None
        number = next(self._numbers)
        header = msgspec.msgpack.encode(Ask(number=number, slot=question.slot, stores=stores, owner=question.owner))
        try:
            if self._socket is None:
                self._socket = self._sockets.connect_dealer(
                    self._pool.address, max_sent=MAX_SLOTS_WAITING, max_received=MAX_SLOTS_WAITING, linger_ms=0
                )
            self._socket.send_multipart([header, question.data] if stores else [header], zmq.NOBLOCK)
        except zmq.ZMQError as error:  # too many questions are open, or there is no such address
            question.fail(PoolError(f"host {self._pool.host} ({self._pool.address}) cannot be asked: {error}"))
            return
        question.asked_at = time.monotonic()
        self._open[number] = question

    def collect(self) -> None:
        """Takes the answers that have come, and gives up those that a silent host owes."""
        while self._socket is not None:
            try:
                header, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            self._heard_at = time.monotonic()
            self._answered(header, frames)
        if self._open and time.monotonic() >= self._silent_at():
            self._give_up(f"has not answered in {self._timeout_s:g} s")

    def close(self) -> None:
        """Fails all open questions, and closes the socket."""
        self._give_up("is no longer asked")
        self._sockets.close()

    def _silent_at(self) -> float:
        """When the oldest question will have waited long enough."""
        return max(next(iter(self._open.values())).asked_at, self._heard_at) + self._timeout_s

    def _answered(self, header: bytes, frames: list[bytes]) -> None:
        try:
            answer = _answers.decode(header)
        except msgspec.MsgspecError as error:
            self._give_up(f"sent no valid answer: {error}")
            return
        question = self._open.pop(answer.number, None)
        if question is None:
            return  # it was given up
        if answer.error:
            question.fail((StaleSlotError if answer.stale else ValueError)(answer.error))
        elif question.data is not None:
            question.done.set_result(None)
        else:
            try:
                question.done.set_result(self._verified(question.slot, frames))
            except StaleSlotError as error:
                question.fail(error)

    def _verified(self, slot: Slot, frames: list[bytes]) -> memoryview:
        if len(frames) != 1:
            raise StaleSlotError(f"host {self._pool.host} sent {len(frames)} frames")
        image = memoryview(bytearray(frames[0]))
        return slots.read(image, msgspec.structs.replace(slot, offset=0, nbytes=len(image)), self._pool.checksum, False)

    def _give_up(self, why: str) -> None:
        """Ends all open questions; the next one starts over, on a new socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        given_up, self._open = self._open, {}
        for question in given_up.values():
            question.fail(PoolError(f"host {self._pool.host} ({self._pool.address}) {why}"))

"""Pools of other hosts: their slots are fetched from and stored by the cache daemon that owns them, over TCP.

Lives in the cache daemon (`SlotServer`, on its event loop; owns the listening socket) and in workers of other hosts
(`RemoteView`, which owns a socket and belongs to one thread). Only pools in host memory can be reached so.

One request is a header (MessagePack) and, to store, the data; the answer is a header and, to fetch, the slot as it lies
in memory, header and data. A reader verifies what has arrived as it would a slot of its own host: a checksum made where
it was written, or where it was stored, is checked where it is read. There is no authentication, as on the broker's
address: keep both private.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from typing import Any

import msgspec
import structlog
import zmq

from cache import slot as slots
from cache.pools.base import PoolError
from cache.slot import StaleSlotError
from epd import wire
from epd.messages import Pool, Slot, Struct
from epd.sockets import MessageSocket

log = structlog.get_logger()

TIMEOUT_S = 2.0
# A host that has not answered is not asked again for so long: each question holds up an engine.
AWAY_S = 1.0
_COMPLAIN_EVERY_S = 1.0


class Ask(Struct, frozen=True):
    """Fetch a slot; or store it, written by `owner`. `number` comes back with the answer."""

    number: int
    slot: Slot
    stores: bool = False
    owner: str = ""


class Answer(Struct, frozen=True):
    """What came of it: done, or the reason why not; `stale` where the slot holds something else."""

    number: int
    error: str = ""
    stale: bool = False


_asks, _answers = msgspec.msgpack.Decoder(Ask), msgspec.msgpack.Decoder(Answer)


class SlotServer:
    """Serves one pool in host memory to workers of other hosts, on the running event loop.

    Args:
        address: where to listen and be reached, `tcp://ADDRESS:PORT`; port `*` picks one.
        pool: the pool.
        memory: all of it, writable.

    Raises:
        PoolError: it cannot listen there, or nobody can reach it there.
    """

    def __init__(self, address: str, pool: Pool, memory: memoryview) -> None:
        self._pool, self._memory = pool, memory
        if address.removeprefix("tcp://").startswith(("*:", "0.0.0.0:", "[::]:")):
            raise PoolError(f"cache.address {address}: name one address of this host, at which others reach it")
        self._context = zmq.Context()
        sock = self._context.socket(zmq.ROUTER)
        sock.setsockopt(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
        try:
            sock.bind(address)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise PoolError(f"cache.address {address}: {error.strerror or error}") from None
        self.address: str = sock.getsockopt_string(zmq.LAST_ENDPOINT)
        self._socket = MessageSocket(sock, self._handle)
        self._complained_at = 0.0

    def close(self) -> None:
        """Stops serving."""
        self._socket.close()
        self._context.destroy(linger=200)

    def _handle(self, parts: list[bytes]) -> None:
        try:
            peer, header, *data = parts
            ask = _asks.decode(header)
        except (ValueError, msgspec.MsgspecError) as error:
            if (now := time.monotonic()) - self._complained_at > _COMPLAIN_EVERY_S:
                self._complained_at = now
                log.warning("malformed question for a slot", reason=str(error)[:200])
            return
        frames: list[bytes] = []
        try:
            if ask.slot.pool_id != self._pool.pool_id:
                raise StaleSlotError(f"pool {ask.slot.pool_id} is gone")
            if not ask.stores:
                frames = [slots.copy_out(self._memory, ask.slot)]
            elif len(data) == 1:
                slots.write(self._memory, ask.slot, data[0], ask.owner, self._pool.checksum)
            else:
                raise ValueError(f"{len(data)} frames of data")
            answer = Answer(number=ask.number)
        except StaleSlotError as error:
            answer = Answer(number=ask.number, error=str(error), stale=True)
        except ValueError as error:
            answer = Answer(number=ask.number, error=str(error))
        try:
            self._socket.send([peer, msgspec.msgpack.encode(answer), *frames])
        except zmq.ZMQError as error:  # who has asked is gone, or takes nothing more
            log.debug("not answered", reason=str(error))


class RemoteView:
    """A pool of another host, to read and to write.

    Every call waits for the other host, `timeout_s` at most.

    Args:
        pool: the pool; it has an `address`.
        timeout_s: how long an answer may take.
        clock: seconds of any monotonic clock.
    """

    def __init__(
        self, pool: Pool, *, timeout_s: float = TIMEOUT_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._pool, self._timeout_s, self._clock = pool, timeout_s, clock
        self._context = zmq.Context()
        self._sock: zmq.Socket[bytes] | None = None
        self._numbers = itertools.count(1)
        self._away_until = 0.0

    @property
    def pool(self) -> Pool:
        """The pool it shows."""
        return self._pool

    def write(self, slot: Slot, data: bytes | bytearray | memoryview, owner: str) -> None:
        """Stores a slot; see `cache.slot.write`. Readers may have it once this returns.

        Raises:
            ValueError: `data` or `owner` do not fit the slot, or the slot not the pool.
            StaleSlotError: the pool is gone.
            PoolError: its host does not answer; the slot may have been written all the same.
        """
        self._call(Ask(number=next(self._numbers), slot=slot, stores=True, owner=owner), [data])

    def read(self, slot: Slot) -> memoryview:
        """A slot's data, copied and verified; see `cache.slot.read`.

        Raises:
            StaleSlotError: the slot holds anything else, or its host does not answer.
        """
        try:
            frames = self._call(Ask(number=next(self._numbers), slot=slot), [])
        except (PoolError, ValueError) as error:
            raise StaleSlotError(str(error)) from None
        if len(frames) != 1:
            raise StaleSlotError(f"host {self._pool.host} sent {len(frames)} frames")
        image = memoryview(bytearray(frames[0]))
        return slots.read(image, msgspec.structs.replace(slot, offset=0, nbytes=len(image)), self._pool.checksum, False)

    def settle(self) -> None:
        """Nothing to note: a write is done when it returns."""

    def close(self) -> None:
        """Closes the socket."""
        self._hang_up()
        self._context.destroy(linger=0)

    def _call(self, ask: Ask, data: list[Any]) -> list[bytes]:
        now = self._clock()
        if now < self._away_until:
            raise PoolError(f"host {self._pool.host} ({self._pool.address}) does not answer")
        if self._sock is None:
            self._sock = self._context.socket(zmq.DEALER)
            self._sock.setsockopt(zmq.LINGER, 0)
            self._sock.setsockopt(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
            self._sock.connect(self._pool.address)
        self._sock.send_multipart([msgspec.msgpack.encode(ask), *data])
        until = time.monotonic() + self._timeout_s
        while self._sock.poll(max(0, round((until - time.monotonic()) * 1000))):
            try:
                header, *frames = self._sock.recv_multipart()
                answer = _answers.decode(header)
            except (ValueError, msgspec.MsgspecError) as error:
                raise PoolError(f"host {self._pool.host} sent no answer: {error}") from None
            if answer.number == ask.number:  # else it is one that came too late
                if answer.error:
                    raise (StaleSlotError if answer.stale else ValueError)(answer.error)
                return frames
        self._hang_up()
        self._away_until = self._clock() + AWAY_S
        raise PoolError(f"host {self._pool.host} ({self._pool.address}) has not answered in {self._timeout_s:g} s")

    def _hang_up(self) -> None:
        if self._sock is not None:
            self._sock.close(linger=0)
            self._sock = None

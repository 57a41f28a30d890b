"""Serves a pool to workers of other hosts, over TCP; `cache.pools.remote` is their side.

Lives in the cache daemon, on its event loop; owns the listening socket. Only pools in host memory can be served so.

One question is a header (MessagePack) and, to store, the data; the answer is a header and, to fetch, the slot as it
lies in memory, header and data. A reader verifies what arrives like a slot of its own host: a checksum that was made
where the slot was written or stored is checked where it is read. There is no authentication, as on the
broker's address: keep both private.
"""

from __future__ import annotations

import time

import msgspec
import structlog
import zmq

from cache import slot as slots
from cache.pools.base import PoolError
from cache.slot import StaleSlotError
from epd.messages import Pool, Slot, Struct
from epd.transport.factory import AddressError, SocketFactory, address_of
from epd.transport.sockets import MessageSocket

log = structlog.get_logger()

# For one worker: each may carry the data of a slot.
MAX_SLOTS_WAITING = 1000
_COMPLAIN_EVERY_S = 1.0


class Ask(Struct, frozen=True):
    """Fetch a slot; or store it, written by `owner`. `number` comes back with the answer."""

    number: int
    slot: Slot
    stores: bool = False
    owner: str = ""


class Answer(Struct, frozen=True):
    """The result: done, or the reason why not; `stale` if the slot holds something else."""

    number: int
    error: str = ""
    stale: bool = False


_asks = msgspec.msgpack.Decoder(Ask)


class SlotServer:
    """Serves one pool in host memory to workers of other hosts, on the running event loop.

    Args:
        address: where to listen and be reached, `tcp://ADDRESS:PORT`; port `*` picks one.
        pool: the pool.
        memory: all of it, writable.

    Raises:
        PoolError: it cannot listen there, or nobody could reach it there.
    """

    def __init__(self, address: str, pool: Pool, memory: memoryview) -> None:
        self._pool, self._memory = pool, memory
        if address.removeprefix("tcp://").startswith(("*:", "0.0.0.0:", "[::]:")):
            raise PoolError(f"cache.address {address}: name one address of this host at which others can reach it")
        self._sockets = SocketFactory()
        try:
            sock = self._sockets.bind_router(address, max_waiting=MAX_SLOTS_WAITING)
        except AddressError as error:
            self._sockets.close()
            raise PoolError(f"cache.address: {error}") from None
        self.address = address_of(sock)
        self._socket = MessageSocket(sock, self._handle)
        self._complained_at = 0.0

    def close(self) -> None:
        """Stops serving."""
        self._socket.close()
        self._sockets.close()

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
        except zmq.ZMQError as error:  # the asker is gone, or takes nothing more
            log.debug("not answered", reason=str(error))

"""A pool of another host: a real server on an event loop of its own, in a thread."""

from __future__ import annotations

import asyncio
import secrets
import threading

import msgspec

from cache.pools import SharedMemoryPool, SharedMemoryView
from cache.pools.server import SlotServer
from cache.slot import slot_bytes
from epd.messages import Slot

NBYTES = slot_bytes(3, 8, "float32")
DATA = bytes(range(96))


class Served:
    """A pool of a host called "far", and its server."""

    def __init__(self) -> None:
        self.owner = SharedMemoryPool(secrets.token_hex(4), 1 << 16, True)
        self.local = SharedMemoryView(self.owner.descriptor())
        self.pool = msgspec.structs.replace(self.owner.descriptor(), host="far")
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever)
        self.thread.start()
        self.server: SlotServer | None = None
        self.serve("tcp://127.0.0.1:*")

    def serve(self, address: str) -> None:
        async def start() -> SlotServer:
            return SlotServer(address, self.pool, self.local.memory)

        self.server = asyncio.run_coroutine_threadsafe(start(), self.loop).result(5)
        self.pool = msgspec.structs.replace(self.pool, address=self.server.address)

    def stop(self) -> None:
        async def stop() -> None:
            assert self.server
            self.server.close()

        if self.server:
            asyncio.run_coroutine_threadsafe(stop(), self.loop).result(5)
        self.server = None

    def close(self) -> None:
        self.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(5)
        self.loop.close()
        self.local.close()
        self.owner.close()

    def slot(self, number: int = 0, generation: int = 7, owner: str = "encoder") -> Slot:
        return Slot(
            pool_id=self.pool.pool_id, offset=number * NBYTES, nbytes=NBYTES, generation=generation, num_tokens=3,
            width=8, dtype="float32", owner=owner,
        )  # fmt: skip

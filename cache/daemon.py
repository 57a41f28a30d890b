"""The cache daemon: owns one pool of embeddings, so that they outlive every worker, and tells the broker of it.

Lives in a process of its own; owns the pool's memory. What is in the pool is the business of the index, in the broker;
this process decides nothing. Each start makes a new pool under a new random id: whatever names the old one is refused.
With `cache.address` it also serves slots to workers of other hosts (`cache.pools.server`).
"""

from __future__ import annotations

import contextlib
import secrets

import msgspec
import structlog

from cache import pools
from cache.pools.shared_memory import SharedMemoryView, sweep_stale
from epd.config import Config
from epd.messages import Kind, Message, Pool, Welcome
from epd.process import lifecycle, resources
from epd.process.lifecycle import Life
from epd.transport.link import BrokerLink

log = structlog.get_logger()


def run(config: Config, name: str) -> int:
    """Runs the cache daemon `name` until SIGINT or SIGTERM; returns the exit status."""
    return lifecycle.run(config.log, name, lambda life: main(config, name, life))


async def main(config: Config, name: str, life: Life) -> int:
    """Owns a pool and keeps it registered with the broker until it is stopped.

    While the broker is lost the pool stays, and registration goes on by itself.

    Returns:
        The exit status: 1 if the pool cannot be made.
    """

    async def registered(welcome: Welcome) -> None:
        log.info("registered with the broker", lost_after_s=welcome.lost_after_s)
        life.ready()

    if swept := sweep_stale():
        log.info("removed segments of dead owners", names=swept)
    pool_id = secrets.token_hex(8)
    try:
        pool = pools.create(config.cache.kind, pool_id, config.cache.pool_bytes, config.cache.checksum)
    except pools.PoolError as error:
        log.error("no pool", reason=str(error))
        return lifecycle.FAILED
    with contextlib.closing(pool), contextlib.ExitStack() as stack:
        descriptor = pool.descriptor()
        log.info("pool made", pool=descriptor.name, nbytes=descriptor.nbytes)
        if config.cache.address:
            try:
                descriptor = _serve(descriptor, config.cache.address, stack)
            except pools.PoolError as error:
                log.error("pool not served", reason=str(error))
                return lifecycle.FAILED
        async with BrokerLink(
            config.broker.address,
            name,
            Kind.CACHE,
            on_message=_unexpected,
            pools=lambda: [descriptor],
            on_registered=registered,
            held=lambda: resources.of_process() | {"pools": 1},
        ) as link:
            await life.end()
            link.goodbye("stopped")
    log.info("pool removed", pool=descriptor.name)
    return lifecycle.OK


def _serve(pool: Pool, address: str, stack: contextlib.ExitStack) -> Pool:
    """Serves a pool to other hosts until `stack` is closed; returns it with its address."""
    from cache.pools.server import SlotServer

    if pool.kind in pools.DEVICE_KINDS:
        raise pools.PoolError("pools in GPU memory cannot be served to other hosts: leave cache.address empty")
    view = SharedMemoryView(pool)
    stack.callback(view.close)
    server = SlotServer(address, pool, view.memory)
    stack.callback(server.close)
    log.info("pool served", address=server.address)
    return msgspec.structs.replace(pool, address=server.address)


def _unexpected(message: Message, frames: list[bytes]) -> None:
    log.warning("message that is not for a cache", message=type(message).__name__)

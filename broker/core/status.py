"""What endpoints are told about workers, and the counters. Pure; a part of the decision core.

An endpoint is told of all workers once, and after that only of changes: a thousand workers cost one STATUS of a
thousand lines, not one a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from broker.core.counts import Counts
from broker.core.outbox import Outbox
from broker.core.patches import Patches
from broker.core.peers import Peer, Registry, Stages, Worker
from epd import messages as m

Held = Callable[[], dict[str, int]]


class StatusBoard:
    """Knows what has changed since each endpoint was last told.

    Args:
        held: what the core holds, by the names in `epd.messages.Counters`.

    Attributes:
        process_held: what the daemon's process holds, as last reported.
    """

    def __init__(
        self, registry: Registry, stages: Stages, outbox: Outbox, patches: Patches, counts: Counts, held: Held
    ) -> None:
        self._registry, self._stages, self._outbox, self._patches = registry, stages, outbox, patches
        self._counts, self._held = counts, held
        self.process_held: dict[str, int] = {}

    def changed(self, worker: Worker) -> None:
        """Something about a worker is new."""
        for endpoint in self._registry.endpoints.values():
            if endpoint.changed is not None:
                endpoint.changed[worker.peer_id] = worker

    def gone(self, worker: Worker) -> None:
        """A worker is no longer registered."""
        for endpoint in self._registry.endpoints.values():
            if endpoint.changed is not None:
                endpoint.changed.pop(worker.peer_id, None)
                endpoint.gone[worker.peer_id] = None

    def tell_all(self) -> None:
        """Tells all endpoints what has changed."""
        for endpoint in self._registry.endpoints.values():
            self.tell(endpoint)

    def tell(self, endpoint: Peer, *, whole: bool = False) -> None:
        """Tells an endpoint what has changed since it was last told; everything the first time, or if `whole`."""
        for peer_id in self._stages.touched:
            if (worker := self._registry.workers.get(peer_id)) is not None:
                self.changed(worker)
        self._stages.touched.clear()
        is_whole = whole or endpoint.changed is None
        workers = self._registry.workers if is_whole or endpoint.changed is None else endpoint.changed
        gone = [] if is_whole else list(endpoint.gone)
        status = self.status(list(workers.values()), gone=gone, is_whole=is_whole)
        endpoint.changed, endpoint.gone = {}, {}
        self._outbox.send(endpoint.peer_id, status)

    def status(self, workers: list[Worker], *, gone: list[str], is_whole: bool) -> m.Status:
        """A STATUS of some workers."""
        counters = self.counters()
        held = {name: getattr(counters, name) for name in counters.__struct_fields__ if name.startswith("held_")}
        others = (*self._registry.endpoints.values(), *self._registry.caches.values())
        return m.Status(
            workers=[worker.status() for worker in workers],
            counters=counters,
            gone=gone,
            is_whole=is_whole,
            num_pools=len(self._registry.pools()),
            broker_held={name.removeprefix("held_"): count for name, count in held.items()} | self.process_held,
            peers_held={peer.name: peer.held for peer in others},
        )

    def counters(self) -> m.Counters:
        """The counts; the `held_*` ones are 0 when nothing is in flight."""
        stats = self._patches.index.stats()
        counted: dict[str, Any] = {name: getattr(self._counts, name) for name in self._counts.__slots__}
        return m.Counters(
            **counted,
            **self._held(),
            num_encoded=self._patches.num_encoded,
            num_cache_hits=stats.num_hits,
            num_coalesced=stats.num_coalesced,
            num_evicted=stats.num_evictions,
            encode_s_saved=self._patches.encode_s_saved,
            cache_bytes_used=stats.used_bytes,
            cache_bytes_pinned=stats.pinned_bytes,
            cache_bytes_quarantined=stats.quarantined_bytes,
            cache_embeddings=stats.num_embeddings,
            cache_bytes_total=stats.total_bytes,
        )

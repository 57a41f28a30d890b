"""How peers come, change their stage, and go. Pure; a part of the decision core."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import cast

from broker.core.counts import Counts
from broker.core.endings import Endings
from broker.core.journal import Journal
from broker.core.legs import Legs
from broker.core.liveness import Liveness
from broker.core.outbox import Outbox
from broker.core.patches import QUARANTINE_S, Lost, Patches
from broker.core.peers import Peer, Registry, Stages, Worker
from broker.core.progress import Progress, tell_lost
from broker.core.status import StatusBoard
from broker.core.timers import Timers
from broker.core.uploads import Uploads
from broker.core.wake import Wake
from broker.policies.costs import Cost
from epd import messages as m
from epd.config import BrokerConfig
from epd.errors import ErrorCode
from epd.journal import Happening
from epd.messages import Kind, Stage

Frames = Sequence[bytes]


class Membership:
    """Registers peers, and settles what those that are gone leave behind."""

    def __init__(
        self,
        config: BrokerConfig,
        outbox: Outbox,
        registry: Registry,
        stages: Stages,
        patches: Patches,
        liveness: Liveness,
        legs: Legs,
        progress: Progress,
        endings: Endings,
        uploads: Uploads,
        status: StatusBoard,
        timers: Timers,
        wake: Wake,
        counts: Counts,
        journal: Journal,
    ) -> None:
        self._config, self._outbox, self._registry, self._stages = config, outbox, registry, stages
        self._patches, self._liveness, self._legs, self._progress = patches, liveness, legs, progress
        self._endings, self._uploads, self._status = endings, uploads, status
        self._timers, self._wake, self._counts, self._journal = timers, wake, counts, journal

    # ---- coming ----------------------------------------------------------------------------------------------------

    def hello(self, peer_id: str, hello: m.Hello, now: float) -> None:
        """HELLO: registers an incarnation; one that is already registered is welcomed again."""
        if hello.incarnation != peer_id or (hello.kind is Kind.WORKER) != (hello.stage is not None):
            self._counts.num_fenced += 1
            return
        if (peer := self._registry.get(peer_id)) is None:
            if earlier := self._registry.named(hello.name):
                self.lose(earlier, "it registered again", now)
            self._lift_quarantine_of(hello.name)
            peer = self._registry.add(hello, now)
            self._liveness.watch(peer)
            if isinstance(peer, Worker):
                self._begin_stage(peer)
            for pool in hello.pools:
                self._patches.add_pool(pool)
            self._changed(now)
            if hello.pools:
                self._tell_pools()
            if isinstance(peer, Worker):
                self._tell(peer, Happening.JOINED, now, peer.stage)
        config = self._config
        pools = self._registry.pools()
        welcome = m.Welcome(heartbeat_s=config.heartbeat_s, lost_after_s=config.lost_after_s, pools=pools)
        self._outbox.send(peer_id, welcome)
        if hello.kind is Kind.ENDPOINT:
            self._status.tell(peer, whole=True)

    def serves(self, peer: Peer, message: m.Serves, frames: Frames, now: float) -> None:
        """SERVES: a worker that has nothing to do serves another stage from now on."""
        worker = cast(Worker, peer)
        if worker.jobs or worker.legs or worker.owes:
            self._counts.num_fenced += 1
            return
        self._stages.remove(worker)
        worker.stage, worker.info, worker.draining, worker.cost = message.stage, message.info, False, Cost()
        self._begin_stage(worker)
        self._changed(now)
        self._tell(worker, Happening.SERVES, now, worker.stage)

    def _begin_stage(self, worker: Worker) -> None:
        self._stages.add(worker)
        if worker.stage is Stage.ENCODE:
            self._patches.encode_info = worker.info
            self._patches.queue.workers_changed()

    # ---- going -----------------------------------------------------------------------------------------------------

    def draining(self, peer: Peer, message: m.Draining, frames: Frames, now: float) -> None:
        """DRAINING: a worker gets nothing new."""
        worker = cast(Worker, peer)
        worker.draining = True
        self._stages.retire(worker)
        self._patches.queue.workers_changed()
        self._changed(now)
        self._tell(worker, Happening.DRAINING, now)

    def goodbye(self, peer: Peer, message: m.Goodbye, frames: Frames, now: float) -> None:
        """GOODBYE: a peer leaves; if it was draining, nothing that it had can be to blame."""
        orderly = peer.draining or peer.kind is Kind.CACHE
        self.lose(peer, message.reason or "it said goodbye", now, orderly=orderly)

    def lose(self, peer: Peer, reason: str, now: float, *, orderly: bool = False) -> None:
        """A peer is gone; `orderly` if it announced that in time, so that nothing it had can be to blame."""
        self._registry.remove(peer)
        lost: list[Lost] = []
        for pool in peer.pools:
            lost += self._patches.pool_lost(pool)
        if isinstance(peer, Worker):
            self._stages.remove(peer)
            if peer.stage is Stage.ENCODE:
                lost += self._encode_worker_lost(peer, now)
        for one in lost:
            tell_lost(one, ErrorCode.WORKER_LOST, now, blame=not orderly)
        if isinstance(peer, Worker):
            for leg_id in list(peer.owes):
                self._legs.released(peer, leg_id)
            for leg in list(peer.legs):
                if self._legs.by_id.get(leg.leg_id) is leg:
                    self._progress.worker_lost(peer, leg, reason, now, blame=not orderly)
        self._uploads.endpoint_lost(peer)
        for request in list(peer.requests.values()):
            self._endings.cancel(request, now)
        if peer.pools:
            self._tell_pools()
        self._changed(now)
        if isinstance(peer, Worker):
            self._status.gone(peer)
            self._status.tell_all()
            self._journal.worker(now, Happening.LEFT, peer.name, reason)
        self._journal.leave(peer)

    def _encode_worker_lost(self, worker: Worker, now: float) -> list[Lost]:
        lost, quarantined = self._patches.worker_lost(worker)
        self._patches.queue.workers_changed()
        for generation in quarantined:
            lift = partial(self._patches.lift_quarantine, generation)
            self._timers.set(now + QUARANTINE_S, lambda _, lift=lift: lift())  # type: ignore[misc]
        return lost

    def _lift_quarantine_of(self, name: str) -> None:
        """A worker is back, so its earlier incarnation cannot write any more."""
        for generation in [one for one, worker in self._patches.quarantined.items() if worker == name]:
            self._patches.lift_quarantine(generation)

    def _changed(self, now: float) -> None:
        self._liveness.update(now)
        self._wake.changed()
        self._liveness.on_gone(now)

    def _tell(self, worker: Worker, what: Happening, now: float, detail: str = "") -> None:
        """Something is new about a worker."""
        self._status.changed(worker)
        self._status.tell_all()
        self._journal.worker(now, what, worker.name, detail)

    def _tell_pools(self) -> None:
        message = m.Pools(pools=self._registry.pools())
        for worker in self._registry.workers.values():
            self._outbox.send(worker.peer_id, message)

    # ---- staying ---------------------------------------------------------------------------------------------------

    def heartbeat(self, peer: Peer, message: m.Heartbeat, frames: Frames, now: float) -> None:
        """HEARTBEAT: still here, and how it is."""
        peer.held, peer.gauges = message.held, message.gauges
        if isinstance(peer, Worker):
            self._liveness.heard_steps(peer, message.num_steps, now)
            if peer.cost.observe(message.work):
                self._stages[peer.stage].learnt(peer)
            self._status.changed(peer)
        self._outbox.send(peer.peer_id, m.HeartbeatAck())
        if peer.kind is Kind.ENDPOINT:
            self._status.tell(peer)

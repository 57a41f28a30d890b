"""The peers that the broker knows, and what each has to do. Pure; a part of the decision core.

What a peer is (`kind`) never changes while it is registered; the stage that a worker serves may.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from broker.core.stage_workers import StageWorkers
from broker.policies.choice import CHOICES, Candidate
from broker.policies.costs import Cost
from epd.messages import Hello, Kind, Pool, Stage, WorkerInfo, WorkerStatus

if TYPE_CHECKING:
    from broker.core.encoding import Job
    from broker.core.request import Leg, Request
    from broker.core.timers import Timer


@dataclasses.dataclass(slots=True, eq=False)
class Peer:
    """One registered incarnation of an endpoint, a cache daemon or a worker.

    `requests` are those that an endpoint has submitted; `changed` and `gone` are the workers that its next STATUS is
    about, by incarnation; `changed` is None before the first.
    """

    peer_id: str
    name: str
    kind: Kind
    host: str
    pid: int
    pools: list[Pool]
    heard_at: float
    draining: bool = False
    held: dict[str, int] = dataclasses.field(default_factory=dict)
    gauges: dict[str, float] = dataclasses.field(default_factory=dict)
    requests: dict[str, Request] = dataclasses.field(default_factory=dict)
    changed: dict[str, Worker] | None = None
    gone: dict[str, None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True, eq=False)
class Worker(Peer):
    """A worker and its outstanding work.

    That is counted in embedding rows to encode, prompt tokens to prefill, and tokens of KV cache reserved for decoding.
    `jobs` are the patches that it encodes, `legs` all legs that it is part of, `prefilling` those whose prompt it still
    has to compute, `owes` the ids of ended legs that it has not let go of. `stepped_at` is when its engine last made a
    step or got something to do; `hang_check` is set while it has anything to do.
    """

    stage: Stage = Stage.ENCODE
    info: WorkerInfo = dataclasses.field(default_factory=WorkerInfo)
    embeddings_to_encode: int = 0
    tokens_to_prefill: int = 0
    kv_tokens_reserved: int = 0
    jobs: dict[int, Job] = dataclasses.field(default_factory=dict)
    legs: dict[Leg, None] = dataclasses.field(default_factory=dict)
    prefilling: dict[Leg, None] = dataclasses.field(default_factory=dict)
    owes: dict[str, None] = dataclasses.field(default_factory=dict)
    num_done: int = 0
    num_steps: int = 0
    stepped_at: float = 0.0
    hang_check: Timer | None = None
    cost: Cost = dataclasses.field(default_factory=Cost)

    @property
    def load_units(self) -> int:
        """Its outstanding work, in the unit of its stage."""
        if self.stage is Stage.ENCODE:
            return self.embeddings_to_encode
        return self.tokens_to_prefill if self.stage is Stage.PREFILL else self.kv_tokens_reserved

    @property
    def num_tasks(self) -> int:
        """How many patches or legs that is."""
        if self.stage is Stage.ENCODE:
            return len(self.jobs)
        return len(self.prefilling) if self.stage is Stage.PREFILL else len(self.legs)

    @property
    def room_units(self) -> int:
        """How much more it can be given now, in tokens of KV cache; 0 if its batch is full.

        Encode workers have no such limit: how far ahead they are given patches is for `broker.core.encoding` to say.
        """
        if self.stage is Stage.ENCODE:
            return 0
        if self.num_tasks >= self.info.max_num_seqs:
            return 0
        return self.info.kv_capacity_tokens - self.load_units

    @property
    def num_pending(self) -> int:
        """How many things it has to do or to answer."""
        num_decoding = len(self.legs) if self.stage is Stage.DECODE else 0
        return len(self.jobs) + len(self.prefilling) + len(self.owes) + num_decoding

    def status(self) -> WorkerStatus:
        """This worker as shown to people."""
        return WorkerStatus(
            name=self.name,
            stage=self.stage,
            incarnation=self.peer_id,
            host=self.host,
            pid=self.pid,
            num_outstanding=len(self.jobs) or self.num_tasks,
            num_done=self.num_done,
            draining=self.draining,
            info=self.info,
            held=self.held,
            gauges=self.gauges,
        )


class Registry:
    """Registered peers by incarnation, and by kind. At most one incarnation of a name is registered at a time."""

    def __init__(self) -> None:
        self._peers: dict[str, Peer] = {}
        self._by_name: dict[str, Peer] = {}
        self.endpoints: dict[str, Peer] = {}
        self.caches: dict[str, Peer] = {}
        self.workers: dict[str, Worker] = {}

    def __iter__(self) -> Iterator[Peer]:
        return iter(self._peers.values())

    def __contains__(self, peer_id: object) -> bool:
        return peer_id in self._peers

    def get(self, peer_id: str) -> Peer | None:
        """The peer of that incarnation, if it is registered."""
        return self._peers.get(peer_id)

    def named(self, name: str) -> Peer | None:
        """The registered incarnation of `name`."""
        return self._by_name.get(name)

    def add(self, hello: Hello, now: float) -> Peer:
        """Registers the sender of `hello`."""
        about = (hello.incarnation, hello.name, hello.kind, hello.host, hello.pid, hello.pools, now)
        peer: Peer
        if hello.kind is Kind.WORKER:
            assert hello.stage is not None
            peer = worker = Worker(*about, stage=hello.stage, info=hello.info)
            worker.stepped_at = now
            self.workers[peer.peer_id] = worker
        else:
            peer = Peer(*about)
            (self.endpoints if hello.kind is Kind.ENDPOINT else self.caches)[peer.peer_id] = peer
        self._peers[peer.peer_id] = self._by_name[peer.name] = peer
        return peer

    def remove(self, peer: Peer) -> None:
        """Forgets a peer."""
        del self._peers[peer.peer_id]
        del self._by_name[peer.name]
        for group in (self.endpoints, self.caches, self.workers):
            group.pop(peer.peer_id, None)

    def serving(self, stage: Stage) -> list[Worker]:
        """The registered workers of a stage, in order of registration; a scan, for people and tests."""
        return [worker for worker in self.workers.values() if worker.stage is stage]

    def pools(self) -> list[Pool]:
        """The pools of all registered caches."""
        return [pool for cache in self.caches.values() for pool in cache.pools]


class Stages:
    """The stages: their workers that take new work, and how much the largest of each can hold.

    Args:
        choices: the name of each stage's choice (`broker.policies.choice.CHOICES`).

    Attributes:
        touched: the workers whose load has changed since this was last emptied, by id.
    """

    def __init__(self, choices: dict[Stage, str]) -> None:
        self.touched: dict[str, Candidate] = {}
        self._serving = {stage: StageWorkers(CHOICES[choices[stage]](), self.touched) for stage in Stage}
        self._registered: dict[Stage, dict[str, Worker]] = {stage: {} for stage in Stage}
        self._capacity = dict.fromkeys(Stage, 0)

    def __getitem__(self, stage: Stage) -> StageWorkers:
        """The workers of a stage that take new work."""
        return self._serving[stage]

    def add(self, worker: Worker) -> None:
        """A worker serves its stage from now on."""
        self._registered[worker.stage][worker.peer_id] = worker
        self._serving[worker.stage].add(worker)
        self._measure(worker.stage)

    def remove(self, worker: Worker) -> None:
        """A worker no longer serves its stage."""
        self._serving[worker.stage].remove(worker)
        self._registered[worker.stage].pop(worker.peer_id, None)
        self._measure(worker.stage)

    def retire(self, worker: Worker) -> None:
        """A worker takes no new work, but goes on with what it has."""
        self._serving[worker.stage].remove(worker)

    def update(self, worker: Worker) -> None:
        """A worker's load has changed."""
        self._serving[worker.stage].update(worker)

    def is_registered(self, stage: Stage) -> bool:
        """Whether any worker of a stage is registered, including those that take nothing new."""
        return bool(self._registered[stage])

    def too_large(self, num_tokens: int) -> str:
        """Why no worker could ever take a prompt of so many tokens, or an empty string."""
        for stage in (Stage.PREFILL, Stage.DECODE):
            room = self._capacity[stage]
            if self._registered[stage] and num_tokens + 1 > room:
                return f"the prompt has {num_tokens} tokens; the {stage} workers' KV cache holds {room}"
        return ""

    def _measure(self, stage: Stage) -> None:
        workers = self._registered[stage].values()
        self._capacity[stage] = max((worker.info.kv_capacity_tokens for worker in workers), default=0)

"""Messages between the broker and any peer: registration, heartbeats, status. Pure."""

from __future__ import annotations

import msgspec

from epd.messages.parts import Counters, JournalEntry, Kind, Pool, PoolFill, Stage, Struct, WorkerInfo, WorkerStatus


class Hello(Struct, frozen=True):
    """Any peer → Broker: registers under `name`; `incarnation` is new at each start and fences what came before.

    A worker says which `stage` it serves; nobody else does.
    """

    name: str
    kind: Kind
    incarnation: str
    host: str
    pid: int
    stage: Stage | None = None
    info: WorkerInfo = WorkerInfo()
    pools: list[Pool] = msgspec.field(default_factory=list)


class Serves(Struct, frozen=True):
    """Worker → Broker: from now on it serves this stage, and this is what it says of itself there.

    It has nothing to do: what it had is done or was handed back.
    """

    stage: Stage
    info: WorkerInfo


class Welcome(Struct, frozen=True):
    """Broker → any peer: registered. Send a heartbeat every `heartbeat_s`; silent for `lost_after_s`, you are lost."""

    heartbeat_s: float
    lost_after_s: float
    pools: list[Pool] = msgspec.field(default_factory=list)


class Pools(Struct, frozen=True):
    """Broker → worker: the pools have changed; slots named from now on are in these."""

    pools: list[Pool]


class Work(Struct, frozen=True):
    """What an engine has done: `busy_s` seconds of steps in which its model ran, for `num_units` units of work.

    Units are those of the worker's load: embedding rows encoded, prompt tokens prefilled, tokens decoded.
    """

    busy_s: float = 0.0
    num_units: int = 0


class Heartbeat(Struct, frozen=True):
    """Any peer → Broker: still here. `num_steps` counts engine steps, so that a hung engine is noticed.

    `held` counts what the process holds, by kind: requests, patches, KV blocks, tasks, file descriptors. `work` is
    what a worker's engine has done since it began to serve its stage, so that the broker learns what work costs;
    `gauges` are what it tells of itself for metrics, by name (`workers.gauges`).
    """

    num_steps: int = 0
    held: dict[str, int] = msgspec.field(default_factory=dict)
    work: Work = Work()
    gauges: dict[str, float] = msgspec.field(default_factory=dict)


class HeartbeatAck(Struct, frozen=True):
    """Broker → any peer: still here too."""


class Unknown(Struct, frozen=True):
    """Broker → any peer: you are not registered (the broker restarted, or you were silent too long). Say HELLO."""


class Draining(Struct, frozen=True):
    """Worker → Broker: asked to stop: no new work, please. It finishes what it can, then says GOODBYE."""


class Goodbye(Struct, frozen=True):
    """Any peer → Broker: leaving in good order; nothing more will come."""

    reason: str = ""


class Status(Struct, frozen=True):
    """Broker → Endpoint: workers and counters, when workers come or go and with each heartbeat's answer.

    `workers` are those that have changed since the last STATUS to this endpoint, or with `is_whole` all of them; `gone`
    are the incarnations of those that are no longer registered. `broker_held` counts what the broker itself holds,
    `peers_held` (by name) what caches and endpoints hold.
    """

    workers: list[WorkerStatus]
    counters: Counters
    gone: list[str] = msgspec.field(default_factory=list)
    is_whole: bool = False
    num_pools: int = 0
    broker_held: dict[str, int] = msgspec.field(default_factory=dict)
    peers_held: dict[str, dict[str, int]] = msgspec.field(default_factory=dict)


class Watch(Struct, frozen=True):
    """Endpoint → Broker: from now on say in JOURNAL what happens, or (`on` is false) no longer."""

    on: bool = True


class Journal(Struct, frozen=True):
    """Broker → Endpoint: what has happened since the last JOURNAL, at most one a tick, in order.

    `num_dropped` counts what had no place in it.
    """

    entries: list[JournalEntry]
    num_dropped: int = 0


class GetCache(Struct, frozen=True):
    """Endpoint → Broker: how are the pools filled?"""


class CacheState(Struct, frozen=True):
    """Broker → Endpoint: the pools, and what is where in them."""

    pools: list[PoolFill] = msgspec.field(default_factory=list)


def updated(before: Status | None, now: Status) -> Status:
    """All workers as of a STATUS, given all as of the one before it."""
    if now.is_whole or before is None:
        return now
    workers = {one.incarnation: one for one in before.workers}
    for incarnation in now.gone:
        workers.pop(incarnation, None)
    workers |= {one.incarnation: one for one in now.workers}
    return msgspec.structs.replace(now, workers=list(workers.values()), gone=[], is_whole=True)

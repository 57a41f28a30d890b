"""Messages between the broker and any peer: registration, heartbeats, status. See the package."""

from __future__ import annotations

import msgspec

from epd.messages.parts import Counters, Pool, PoolFill, Role, Struct, WorkerInfo, WorkerStatus


class Hello(Struct, frozen=True):
    """Any peer → Broker: registers under `name`; `incarnation` is new at each start and fences what came before."""

    name: str
    role: Role
    incarnation: str
    host: str
    pid: int
    info: WorkerInfo = WorkerInfo()
    pools: list[Pool] = msgspec.field(default_factory=list)


class Welcome(Struct, frozen=True):
    """Broker → any peer: registered. Send a heartbeat every `heartbeat_s`; silent for `lost_after_s`, you are lost."""

    heartbeat_s: float
    lost_after_s: float
    pools: list[Pool] = msgspec.field(default_factory=list)


class Pools(Struct, frozen=True):
    """Broker → worker: the pools have changed; slots named from now on are in these."""

    pools: list[Pool]


class Heartbeat(Struct, frozen=True):
    """Any peer → Broker: still here. `num_steps` counts engine steps, so that a hung engine shows.

    `held` counts what the process holds, by kind: requests, patches, KV blocks, tasks, file descriptors. `gauges` are
    what its engine tells of itself for metrics, by name (`workers.gauges`).
    """

    num_steps: int = 0
    held: dict[str, int] = msgspec.field(default_factory=dict)
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
    """Broker → Endpoint: the workers and counters, at each change of the workers and with each heartbeat's answer.

    `broker_held` counts what the broker itself holds, `peers_held` (by name) what caches and endpoints do.
    """

    workers: list[WorkerStatus]
    counters: Counters
    num_pools: int = 0
    broker_held: dict[str, int] = msgspec.field(default_factory=dict)
    peers_held: dict[str, dict[str, int]] = msgspec.field(default_factory=dict)


class GetCache(Struct, frozen=True):
    """Endpoint → Broker: how are the pools filled?"""


class CacheState(Struct, frozen=True):
    """Broker → Endpoint: the pools, and what lies where in them."""

    pools: list[PoolFill] = msgspec.field(default_factory=list)

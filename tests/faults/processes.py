"""The daemons of the cluster: those of `broker.virtual`, but with real stages, and packets of real wire encoding.

What they stand in for is `broker.daemon`, `epd.transport.link`, `cache.daemon`, `workers.daemon` and
`epd.endpoint.engine.flights`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from broker.virtual import endpoint, link
from broker.virtual.broker import Broker
from epd import messages as m
from epd.messages import Message, Stage
from epd.transport import wire
from tests.faults.engines import DTYPE, WIDTH, Engine
from workers.decode import DecodeStage
from workers.encode import EncodeStage
from workers.prefill import PrefillStage
from workers.stage import StageRunner

if TYPE_CHECKING:
    from tests.faults.cluster import Cluster

LATENCY_S = 0.001
STEP_S = 0.005
POOL_BYTES = 1 << 18
BROKER = "broker"
LAST = "last "

STAGES: dict[Stage, type[StageRunner]] = {
    Stage.ENCODE: EncodeStage,
    Stage.PREFILL: PrefillStage,
    Stage.DECODE: DecodeStage,
}


@dataclasses.dataclass(frozen=True)
class Packet:
    """A message on its way: between a role and the broker, or KV between engines (`kind` is then its word)."""

    source: str
    target: str
    kind: str
    parts: list[bytes]


def kind_of(message: Message) -> str:
    """The kind of a packet with a message: outputs with the end of an answer are of another kind than those without."""
    name = type(message).__name__
    is_last = isinstance(message, m.StepOutputs | m.Outputs) and any(one.finish_reason for one in message.outputs)
    return LAST + name if is_last else name


# What becomes of a packet: each (delay in seconds, parts) is delivered.
Fault = Callable[[Packet], list[tuple[float, list[bytes]]]]


class PacketReader(link.Peer):
    """A peer that gets what comes as parts, and counts what is no message."""

    num_malformed = 0

    def receive_parts(self, parts: list[bytes]) -> None:
        self.heard()
        try:
            message, frames = wire.decode(parts)
        except wire.WireError:
            self.num_malformed += 1
        else:
            self.receive(message, frames)


class BrokerProcess(Broker):
    """The core, as `broker.daemon` runs it."""

    num_malformed = 0

    def receive_parts(self, peer_id: str, parts: list[bytes]) -> None:
        try:
            message, frames = wire.decode(parts)
        except wire.WireError:
            self.num_malformed += 1
        else:
            self.receive(peer_id, message, frames)


class CacheProcess(PacketReader, link.Cache):
    """The owner of a pool. When it dies, its memory stays with those who have it mapped."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        super().__init__(cluster, name, POOL_BYTES)
        self.cluster = cluster

    def start(self) -> None:
        super().start()
        self.cluster.pools[self.pool_id] = bytearray(POOL_BYTES)


class WorkerProcess(PacketReader, link.Peer):
    """A real stage over an engine without a model."""

    def __init__(self, cluster: Cluster, role: Stage, name: str) -> None:
        super().__init__(cluster, name)
        self.cluster, self.role = cluster, role

    def start(self) -> None:
        self.engine_id = f"{self.name}.{next(self.cluster.numbers)}"
        self.engine = Engine(self.engine_id, self.cluster.pools, self.send_kv)
        self.cluster.by_engine[self.engine_id] = self
        make, clock = STAGES[self.role], lambda: self.clock.now
        self.stage = make(self.cluster.whole_config, self.name, self.say, lambda command, *args: command(*args), clock)
        self.stage.engine = self.engine  # type: ignore[assignment]
        match self.stage:
            case EncodeStage():
                self.stage._jobs, self.stage._storing, self.stage._num_unsettled = {}, {}, 0
            case PrefillStage():
                self.stage._legs, self.stage._pushing = {}, set()
            case DecodeStage():
                self.stage._requests, self.stage._arriving, self.stage._lacking = {}, set(), {}
        self._steps, self._stepping = 0, False
        super().start()

    def died(self) -> None:
        super().died()
        self.cluster.by_engine.pop(self.engine_id)
        for other in self.cluster.by_engine.values():  # a probe finds that it is gone
            other.engine.peer_gone(self.engine_id)

    def info(self) -> m.WorkerInfo:
        kv = m.KvPeer(engine_id=self.engine_id, host="h", port=1) if self.role is Stage.PREFILL else None
        return m.WorkerInfo(
            model="toy", widths={"image": WIDTH}, dtype=DTYPE, max_batch_tokens=64, max_num_seqs=8,
            owner=self.engine_id[:16], kv=kv, kv_capacity_tokens=4096,
        )  # fmt: skip

    def heartbeat(self) -> m.Heartbeat:
        return m.Heartbeat(num_steps=self._steps)

    def welcomed(self, welcome: m.Welcome) -> None:
        self.stage.set_pools(welcome.pools)

    def lost(self, reason: str) -> None:
        self.stage.reset()

    def take(self, message: Message, frames: Sequence[bytes]) -> None:
        if isinstance(message, m.Pools):
            self.stage.set_pools(message.pools)
        else:
            self.stage.handle(message, frames)
        self._wake()

    def send_kv(self, engine_id: str, leg_id: str, word: str, data: bytes) -> None:
        target = self.cluster.by_engine.get(engine_id)
        if target is None:
            self.later(1.0, lambda: self.engine.peer_gone(engine_id))
            return
        packet = Packet(str(self.role), str(target.role), word, [leg_id.encode(), data])
        for delay_s, parts in self.cluster.fault(packet):
            target.later(LATENCY_S + delay_s, lambda parts=parts: target.take_kv(word, parts))  # type: ignore[misc]

    def take_kv(self, word: str, parts: list[bytes]) -> None:
        self.engine.kv_receive(parts[0].decode(), word, parts[1])
        self._wake()

    def _wake(self) -> None:
        if not self._stepping:
            self._stepping = True
            self.later(STEP_S, self._step)

    def _step(self) -> None:
        self._stepping = False
        self.cluster.before_step(self)
        self.stage.step()
        self._steps += 1
        if self.stage.has_work():
            self._wake()


class EndpointProcess(PacketReader, endpoint.Endpoint):
    """Its clients' tokens are those in the frames that the engines have packed."""

    def tokens_of(self, output: m.RequestOutput, frames: Sequence[bytes]) -> list[int]:
        tokens: list[int] = msgspec.msgpack.decode(frames[0])
        return tokens

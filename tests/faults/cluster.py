"""A whole pipeline in one process and in virtual time: the real broker core and the real stages, over a bad transport.

Messages go through the real wire encoding. `Cluster.faults` decides what becomes of each; everything else is as in the
daemons: heartbeats, registration, fencing by incarnation, a supervisor that starts again what has died.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

from broker.virtual.link import Peer
from broker.virtual.network import Network
from epd.config import BrokerConfig, Config
from epd.messages import Message, Stage
from epd.transport import wire
from tests.faults.engines import Ask
from tests.faults.processes import (
    BROKER,
    LATENCY_S,
    BrokerProcess,
    CacheProcess,
    EndpointProcess,
    Fault,
    Packet,
    PacketReader,
    WorkerProcess,
    kind_of,
)


class Cluster(Network):
    """Two encode, one prefill and two decode workers, a cache, a broker and an endpoint; nothing moves but by `run`."""

    def __init__(self, **broker: Any) -> None:
        config = BrokerConfig(absence_grace_s=10.0, max_queue_s=20.0, hung_after_s=10.0, **broker)
        super().__init__(config, LATENCY_S)
        self.whole_config = Config(broker=config)
        self.by_engine: dict[str, WorkerProcess] = {}
        self.pools: dict[str, bytearray] = {}
        self.faults: list[Fault] = []
        self.asks: list[Ask] = []
        self.seen: list[tuple[Packet, str]] = []
        self.before_step: Callable[[WorkerProcess], None] = lambda worker: None
        self.broker = BrokerProcess(self, BROKER)
        self.endpoint = EndpointProcess(self, "endpoint")
        self.cache = CacheProcess(self, "cache")
        roles = [Stage.ENCODE, Stage.ENCODE, Stage.PREFILL, Stage.DECODE, Stage.DECODE]
        self.workers = [WorkerProcess(self, role, f"{role}-{i}") for i, role in enumerate(roles)]
        for process in (self.broker, self.cache, *self.workers, self.endpoint):
            process.start()
        self.clock.run(2.0)

    def settle(self, within_s: float) -> bool:
        """Lets time pass until all requests have ended and nobody holds anything; whether that was in time."""
        until = self.now + within_s
        while self.now < until:
            self.clock.run(0.5)
            if all(ask.end for ask in self.asks) and not self.held():
                return True
        return False

    # ---- transport -------------------------------------------------------------------------------------------------

    def fault(self, packet: Packet) -> list[tuple[float, list[bytes]]]:
        """What becomes of a packet: the first fault that does anything decides."""
        whole = [(0.0, packet.parts)]
        for fault in self.faults:
            if (made := fault(packet)) != whole:
                return made
        return whole

    def to_broker(self, peer: Peer, message: Message, frames: Sequence[bytes] = ()) -> None:
        self._send(str(peer.role), BROKER, peer.incarnation, message, frames)

    def to_peer(self, incarnation: str, message: Message, frames: Sequence[bytes]) -> None:
        if peer := self.peers.get(incarnation):
            self._send(BROKER, str(peer.role), incarnation, message, frames)

    def _send(self, source: str, target: str, incarnation: str, message: Message, frames: Sequence[bytes]) -> None:
        """Puts a message on the wire between a peer's incarnation and the broker."""
        packet = Packet(source, target, kind_of(message), wire.encode(message, frames))
        self.seen.append((packet, incarnation))
        for delay_s, parts in self.fault(packet):
            self.deliver(target, incarnation, parts, LATENCY_S + delay_s)

    def deliver(self, target: str, incarnation: str, parts: list[bytes], delay_s: float) -> None:
        """Hands parts over after a while: to the broker, or to the incarnation, if it is still there."""
        if target == BROKER:
            self.broker.later(delay_s, lambda: self.broker.receive_parts(incarnation, parts))
        elif peer := cast(PacketReader | None, self.peers.get(incarnation)):

            def hand_over() -> None:
                if self.peers.get(incarnation) is peer:
                    peer.receive_parts(parts)

            peer.later(delay_s, hand_over)

    # ---- what is there ---------------------------------------------------------------------------------------------

    def ask(self, ask: Ask, after_s: float) -> None:
        """Has a client send a request in a while."""
        self.asks.append(ask)
        self.clock.after(after_s, lambda: self.endpoint.ask(ask))

    def worker(self, role: Stage) -> WorkerProcess:
        """The worker of a role that has most to do."""
        mine = [worker for worker in self.workers if worker.role is role]
        return max(mine, key=lambda worker: sum(worker.engine.held().values()))

    def held(self) -> dict[str, int]:
        """What anybody holds for requests; empty when all is at rest."""
        counters = self.broker.core.counters()
        found = {name: getattr(counters, name) for name in counters.__struct_fields__ if name.startswith("held_")}
        for worker in self.workers:
            if not worker.hangs:
                found |= {f"{worker.name} {name}": count for name, count in worker.engine.held().items()}
        return {name: count for name, count in found.items() if count}

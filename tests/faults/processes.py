"""The daemons of the cluster: real core, real stages, and stand-ins for links, cache daemon and endpoint.

What they stand in for is `broker.daemon`, `epd.transport.link`, `cache.daemon`, `workers.daemon` and
`epd.endpoint.engine.flights`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from broker.core.core import Core
from epd import messages as m
from epd.messages import Kind, Message, Stage
from epd.transport import wire
from tests.faults.engines import DTYPE, WIDTH, Ask, Engine
from workers.decode import DecodeStage
from workers.encode import EncodeStage
from workers.prefill import PrefillStage
from workers.stage import StageRunner

if TYPE_CHECKING:
    from tests.faults.cluster import Cluster

LATENCY_S = 0.001
STEP_S = 0.005
RESTART_S = 2.0
HELLO_EVERY_S = 0.5
MAX_RESTARTS = 3
TICK_S = 0.25
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


class Process:
    """Something that can be killed and can hang. Calls for a hanging process wait until it goes on."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster, self.name = cluster, name
        self.life = 0
        self.hangs, self.alive = False, True
        self._waiting: list[Callable[[], None]] = []

    def later(self, delay_s: float, call: Callable[[], None]) -> None:
        """Calls in a while, if this life of the process has not ended by then."""
        life = self.life

        def run() -> None:
            if life != self.life:
                return
            if self.hangs:
                self._waiting.append(run)
            else:
                call()

        self.cluster.after(delay_s, run)

    def hang(self, for_s: float) -> None:
        """SIGSTOP, and SIGCONT after a while."""
        self.hangs = True
        self.cluster.after(for_s, self._go_on)

    def _go_on(self) -> None:
        self.hangs = False
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            call()

    def kill(self) -> None:
        """SIGKILL; the supervisor starts it again."""
        self.life += 1
        self.hangs, self.alive, self._waiting = False, False, []
        self.died()
        self.later(RESTART_S, self._start_again)

    def _start_again(self) -> None:
        self.alive = True
        self.start()

    def died(self) -> None:
        """What goes with it."""

    def start(self) -> None:
        """Begins a life."""


class BrokerProcess(Process):
    """The core, as `broker.daemon` runs it."""

    def start(self) -> None:
        self.core = Core(self.cluster.config.broker, first_generation=1 + int(self.cluster.now * 1e6))
        self.num_malformed = 0
        self._tick()

    def _tick(self) -> None:
        self._perform(self.core.tick(self.cluster.now))
        self.later(TICK_S, self._tick)

    def receive(self, peer_id: str, parts: list[bytes]) -> None:
        try:
            message, frames = wire.decode(parts)
        except wire.WireError:
            self.num_malformed += 1
            return
        self._perform(self.core.handle(peer_id, message, frames, self.cluster.now))

    def _perform(self, sends: list[Any]) -> None:
        for peer_id, message, frames in sends:
            if peer := self.cluster.by_incarnation.get(peer_id):
                self.cluster.send(BROKER, str(peer.role), peer_id, message, frames)


class Peer(Process):
    """A daemon with a link to the broker, as `epd.transport.link` keeps it."""

    role: Kind | Stage

    def start(self) -> None:
        self.num_malformed = 0
        self._register()

    def info(self) -> m.WorkerInfo:
        return m.WorkerInfo()

    def pools(self) -> list[m.Pool]:
        return []

    def _register(self) -> None:
        self.incarnation = f"{self.name}#{next(self.cluster.numbers)}"
        self.registered = False
        self.cluster.by_incarnation[self.incarnation] = self
        self._hello(self.incarnation)

    def _hello(self, incarnation: str) -> None:
        if self.registered or incarnation != self.incarnation:
            return
        hello = m.Hello(
            name=self.name, kind=Kind.WORKER if isinstance(self.role, Stage) else self.role,
            stage=self.role if isinstance(self.role, Stage) else None, incarnation=incarnation, host="h", pid=1,
            info=self.info(), pools=self.pools(),
        )  # fmt: skip
        self.cluster.send(str(self.role), BROKER, incarnation, hello, [])
        self.later(HELLO_EVERY_S, lambda: self._hello(incarnation))

    def died(self) -> None:
        self.cluster.by_incarnation.pop(self.incarnation, None)
        self.registered = False

    def say(self, message: Message, frames: Any = ()) -> None:
        if self.registered:
            self.cluster.send(str(self.role), BROKER, self.incarnation, message, list(frames))

    def _beat(self, incarnation: str, welcome: m.Welcome) -> None:
        if incarnation != self.incarnation:
            return
        self.say(m.Heartbeat(num_steps=self.num_steps()))
        if self.cluster.now - self.heard_at > welcome.lost_after_s:
            self._lose("the broker was silent")
        else:
            self.later(welcome.heartbeat_s, lambda: self._beat(incarnation, welcome))

    def _lose(self, reason: str) -> None:
        self.cluster.by_incarnation.pop(self.incarnation, None)
        self.registered = False
        self.lost(reason)
        self._register()

    def num_steps(self) -> int:
        return 0

    def receive(self, parts: list[bytes]) -> None:
        self.heard_at = self.cluster.now
        try:
            message, frames = wire.decode(parts)
        except wire.WireError:
            self.num_malformed += 1
            return
        match message:
            case m.HeartbeatAck():
                pass
            case m.Welcome() if not self.registered:
                self.registered = True
                self.welcomed(message)
                incarnation = self.incarnation
                self.later(message.heartbeat_s, lambda: self._beat(incarnation, message))
            case m.Welcome():
                pass
            case m.Unknown():
                if self.registered:
                    self._lose("the broker does not know this incarnation")
            case _ if self.registered:
                self.take(message, frames)

    def welcomed(self, welcome: m.Welcome) -> None:
        """The broker has registered this peer."""

    def lost(self, reason: str) -> None:
        """The broker is gone, and with it all that it knew."""

    def take(self, message: Message, frames: list[bytes]) -> None:
        """A message that is not the link's."""


class CacheProcess(Peer):
    """The owner of a pool. When it dies, its memory stays with those who have it mapped."""

    role = Kind.CACHE

    def start(self) -> None:
        self.pool_id = f"pool{next(self.cluster.numbers)}"
        self.cluster.pools[self.pool_id] = bytearray(POOL_BYTES)
        super().start()

    def pools(self) -> list[m.Pool]:
        return [m.Pool(pool_id=self.pool_id, kind="shared_memory", name="p", nbytes=POOL_BYTES, host="h")]


class WorkerProcess(Peer):
    """A real stage over an engine without a model."""

    def __init__(self, cluster: Cluster, role: Stage, name: str) -> None:
        super().__init__(cluster, name)
        self.role = role

    def start(self) -> None:
        self.engine_id = f"{self.name}.{next(self.cluster.numbers)}"
        self.engine = Engine(self.engine_id, self.cluster.pools, self.send_kv)
        self.cluster.by_engine[self.engine_id] = self
        make, clock = STAGES[self.role], lambda: self.cluster.now
        self.stage = make(self.cluster.config, self.name, self.say, lambda command, *args: command(*args), clock)
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

    def num_steps(self) -> int:
        return self._steps

    def welcomed(self, welcome: m.Welcome) -> None:
        self.stage.set_pools(welcome.pools)

    def lost(self, reason: str) -> None:
        self.stage.reset()

    def take(self, message: Message, frames: list[bytes]) -> None:
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


class EndpointProcess(Peer):
    """Submits requests, holds them, and submits them to the next broker too, as `epd.endpoint.engine.flights` does."""

    role = Kind.ENDPOINT

    def start(self) -> None:
        self.asks: dict[str, Ask] = {}
        super().start()

    def died(self) -> None:
        super().died()
        for ask in self.asks.values():
            ask.end = ask.end or "connection lost"

    def ask(self, ask: Ask) -> None:
        if not self.alive:
            ask.end = "connection lost"
            return
        self.asks[ask.request_id] = ask
        self.later(ask.deadline_at + 5.0 - self.cluster.now, lambda: self._fail(ask, "deadline_exceeded"))
        if self.registered:
            self._submit(ask)

    def _submit(self, ask: Ask) -> None:
        patches = [m.Patch(patch_hash=one, modality="image", num_tokens=4, num_frames=1) for one in ask.pixels]
        submit = m.Submit(
            request_id=ask.request_id, num_prompt_tokens=len(ask.request.prompt), max_tokens=ask.request.max_tokens,
            num_engine_frames=1, patches=patches, deadline_s=max(ask.deadline_at - self.cluster.now, 0.001),
            attempts=ask.attempts, output_token_ids=list(ask.tokens), resumable=ask.resumable,
            prefill_samples=ask.prefill_samples,
        )  # fmt: skip
        ask.attempts += 1
        self.say(submit, [msgspec.msgpack.encode(ask.request), *ask.pixels.values()])

    def cancel(self, ask: Ask) -> None:
        ask.end = ask.end or "cancelled"
        self.say(m.Cancel(request_id=ask.request_id))

    def _submit_rest(self, ask: Ask) -> None:
        """Tokens are missing: from the last one that is there."""
        if ask.attempts > MAX_RESTARTS or (ask.tokens and not ask.resumable):
            self._fail(ask, "engine_failed")
        else:
            self.say(m.Cancel(request_id=ask.request_id))
            self._submit(ask)

    def _fail(self, ask: Ask, code: str) -> None:
        if not ask.end:
            self.cancel(ask)
            ask.end = code

    def welcomed(self, welcome: m.Welcome) -> None:
        for ask in self.asks.values():
            if not ask.end:
                self._submit(ask)

    def lost(self, reason: str) -> None:
        for ask in self.asks.values():
            if not ask.end and ask.tokens and not ask.resumable:
                ask.end = "broker_lost"

    def take(self, message: Message, frames: list[bytes]) -> None:
        if isinstance(message, m.Outputs):
            at = 0
            for output in message.outputs:
                self._take_output(output, frames[at : at + output.num_frames])
                at += output.num_frames
        elif isinstance(message, m.Failed) and (ask := self.asks.get(message.request_id)) and not ask.end:
            ask.end = message.code

    def _take_output(self, output: m.RequestOutput, frames: list[bytes]) -> None:
        ask = self.asks.get(output.request_id)
        if ask is None or ask.end:
            return
        if output.num_before > len(ask.tokens):
            self._submit_rest(ask)
        elif output.num_before in (-1, len(ask.tokens)):
            ask.tokens += msgspec.msgpack.decode(frames[0])
            if output.finish_reason:
                ask.end = "finished"

"""A broker core with peers that tests speak for: no sockets, no clock but `World.now`."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import msgspec

from broker.core.core import Core
from broker.core.outbox import Send
from cache.slot import slot_bytes
from epd import messages as m
from epd.config import BrokerConfig
from epd.messages import Kind, Message, Stage

POOL_BYTES = 1 << 20
SLOT_BYTES = slot_bytes(4, 64, "bfloat16")
WIDTHS = {"image": 64}


def encode_info(**changes: object) -> m.WorkerInfo:
    return m.WorkerInfo(**{"model": "toy", "widths": WIDTHS, "dtype": "bfloat16", "max_batch_tokens": 64, **changes})


def prefill_info(name: str, **changes: object) -> m.WorkerInfo:
    kv = m.KvPeer(engine_id=f"engine-{name}", host="127.0.0.1", port=5600)
    return m.WorkerInfo(**{"model": "toy", "kv": kv, "kv_capacity_tokens": 4096, "max_num_seqs": 8, **changes})


def decode_info(**changes: object) -> m.WorkerInfo:
    return m.WorkerInfo(**{"model": "toy", "kv_capacity_tokens": 4096, "max_num_seqs": 8, **changes})


class Tokens(m.RequestOutput, frozen=True):
    """What an endpoint is told of a request: tokens, and others will follow."""


class Finished(m.RequestOutput, frozen=True):
    """What an endpoint is told of a request: its last tokens."""


def step(leg_id: str, token_ids: list[int], **more: object) -> m.StepOutputs:
    """An engine step that gave tokens to one leg."""
    return m.StepOutputs(outputs=[m.LegOutput(leg_id=leg_id, token_ids=token_ids, **more)])


def each_output(sends: list[Send]) -> list[Send]:
    """The same, with the outputs of each request by themselves."""
    found = []
    for send in sends:
        if not isinstance(send.message, m.Outputs):
            found.append(send)
            continue
        at = 0
        for output in send.message.outputs:
            kind = Finished if output.finish_reason else Tokens
            frames = send.frames[at : at + output.num_frames]
            at += output.num_frames
            found.append(Send(send.peer_id, kind(**msgspec.structs.asdict(output)), frames))
    return found


class EncodeSend(NamedTuple):
    """An encode job that was sent: to whom, what, and its opaque frames."""

    peer_id: str
    message: m.EncodeJob
    frames: list[bytes]


@dataclasses.dataclass
class World:
    """A core, the time, and everything it has sent that no test has taken yet."""

    config: BrokerConfig = dataclasses.field(default_factory=BrokerConfig)
    now: float = 0.0

    def __post_init__(self) -> None:
        self.core = Core(self.config)
        self.sent: list[Send] = []
        self.names: dict[str, str] = {}
        self.stuck: set[str] = set()

    def join(
        self,
        name: str,
        role: Kind | Stage,
        info: m.WorkerInfo | None = None,
        pools: list[m.Pool] | None = None,
        host: str = "h",
    ) -> str:
        """Registers a peer; its id is its name and the number of times it has joined."""
        number = sum(one == name for one in self.names.values()) + 1
        peer_id = f"{name}#{number}"
        self.names[peer_id] = name
        is_worker = isinstance(role, Stage)
        hello = m.Hello(
            name=name, kind=Kind.WORKER if is_worker else role, stage=role if is_worker else None,
            incarnation=peer_id, host=host, pid=number, info=info or m.WorkerInfo(), pools=pools or [],
        )  # fmt: skip
        self.say(peer_id, hello)
        return peer_id

    def pipeline(self, encode: int = 2, prefill: int = 1, decode: int = 1, pool_bytes: int = POOL_BYTES) -> None:
        """Registers an endpoint `ep`, a cache and the workers e0.., p0.., d0.. and forgets what that sent."""
        self.endpoint = self.join("ep", Kind.ENDPOINT)
        pool = m.Pool(pool_id="pool", kind="shared_memory", name="pool", nbytes=pool_bytes, host="h")
        self.cache = self.join("cache", Kind.CACHE, pools=[pool])
        self.e = [self.join(f"e{i}", Stage.ENCODE, encode_info()) for i in range(encode)]
        self.p = [self.join(f"p{i}", Stage.PREFILL, prefill_info(f"p{i}")) for i in range(prefill)]
        self.d = [self.join(f"d{i}", Stage.DECODE, decode_info()) for i in range(decode)]
        self.sent.clear()

    def say(self, peer_id: str, message: Message, frames: list[bytes] | None = None) -> None:
        """Has a peer send a message; of the outputs of a step, each has one frame where there are any."""
        if isinstance(message, m.StepOutputs) and frames:
            outputs = [msgspec.structs.replace(one, num_frames=1) for one in message.outputs]
            message = m.StepOutputs(outputs=outputs)
        self.sent += each_output(self.core.handle(peer_id, message, frames or [], self.now))

    def wait(self, seconds: float, but: tuple[str, ...] = ()) -> None:
        """Lets time pass in steps of a quarter second; all peers but those named keep sending heartbeats.

        The engines of all that do, but for those in `stuck`, make a step each time.
        """
        for _ in range(round(seconds / 0.25)):
            self.now += 0.25
            for peer in list(self.core.registry):
                if peer.peer_id not in but:
                    num_steps = getattr(peer, "num_steps", 0) + (peer.peer_id not in self.stuck)
                    self.say(peer.peer_id, m.Heartbeat(num_steps=num_steps))
            self.sent += each_output(self.core.tick(self.now))

    def submit(self, request_id: str, patches: list[str] = (), *, tokens: int = 4, prompt: int = 32, **more) -> None:
        """Submits a request with one-frame patches."""
        items = [m.Patch(patch_hash=h, modality="image", num_tokens=tokens, num_frames=1) for h in patches]
        submit = m.Submit(
            **{
                "request_id": request_id,
                "num_prompt_tokens": prompt,
                "max_tokens": 16,
                "num_engine_frames": 1,
                "patches": items,
                **more,
            }
        )
        self.say(self.endpoint, submit, [b"engine", *(f"pixels of {h}".encode() for h in patches)])

    def take(self, kind: type, peer_id: str | None = None) -> list:
        """Takes the messages of one kind (to one peer) that were sent, in order."""
        found = [s for s in self.sent if isinstance(s.message, kind) and peer_id in (None, s.peer_id)]
        self.sent = [s for s in self.sent if s not in found]
        return [s.message for s in found]

    def take_sends(self, kind: type) -> list[Send]:
        """Like `take`, with peers and frames."""
        found = [s for s in self.sent if isinstance(s.message, kind)]
        self.sent = [s for s in self.sent if s not in found]
        return found

    def take_jobs(self) -> list[EncodeSend]:
        """Takes the encode jobs that were sent, each with its worker and frames."""
        jobs = []
        for send in self.take_sends(m.Encode):
            at = 0
            for job in send.message.jobs:
                jobs.append(EncodeSend(send.peer_id, job, send.frames[at : at + job.num_frames]))
                at += job.num_frames
        return jobs

    def say_encoded(self, worker: str, job: m.EncodeJob, generation: int | None = None) -> None:
        """Has a worker say that one patch is in its slot."""
        one = m.EncodedJob(job_id=job.job_id, generation=job.slot.generation if generation is None else generation)
        self.say(worker, m.Encoded(jobs=[one], took_s=0.01))

    def holders(self, patch_hash: str) -> list[str]:
        """The legs that hold a patch, by id."""
        return [leg.leg_id for leg in self.core.patches.holders(patch_hash)]

    def encode_all(self) -> list[tuple[str, m.EncodeJob]]:
        """Answers every encode job until there are no more; returns (worker, job) in order."""
        done = []
        while jobs := self.take_jobs():
            for send in jobs:
                done.append((send.peer_id, send.message))
                self.say_encoded(send.peer_id, send.message)
        return done

    def finish(self, request_id: str, p: str, d: str) -> None:
        """Has the legs of a request run to their ends."""
        self.say(p, m.Prefilled(leg_id=request_id))
        self.say(p, m.Pushed(leg_id=request_id))
        self.say(d, step(request_id, token_ids=[7]), [b"t1"])
        self.say(d, step(request_id, token_ids=[7], finish_reason="stop"), [b"t2"])

    def assert_idle(self) -> None:
        """Nothing is held by anyone."""
        counters = self.core.counters()
        held = {k: getattr(counters, k) for k in m.Counters.__struct_fields__ if k.startswith("held_")}
        assert not any(held.values()), held
        for worker in self.core.registry.workers.values():
            assert not worker.jobs, worker
            assert not worker.legs, worker
            assert not worker.prefilling, worker
            assert not worker.owes, worker
            assert (worker.embeddings_to_encode, worker.tokens_to_prefill, worker.kv_tokens_reserved) == (0, 0, 0)
        assert not any(peer.requests for peer in self.core.registry)
        assert not self.core.legs.by_id
        assert self.core.ledger.held_bytes == 0

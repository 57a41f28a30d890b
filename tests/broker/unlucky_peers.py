"""Peers of the decision core that are honest but unlucky, for a machine that has them behave at random."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine

from epd import messages as m
from epd.config import BrokerConfig
from epd.messages import Kind, Stage
from tests.broker.recorded import RecordedCore
from tests.broker.world import SLOT_BYTES, Finished, Tokens, World, decode_info, encode_info, prefill_info, step

NAMES = {
    Stage.ENCODE: ["e0", "e1"],
    Stage.PREFILL: ["p0", "p1"],
    Stage.DECODE: ["d0", "d1"],
    Kind.CACHE: ["cache"],
    Kind.ENDPOINT: ["ep"],
}
ROLE_OF = {name: role for role, names in NAMES.items() for name in names}
HASHES = [f"h{i}" for i in range(7)]
KV_TOKENS, NUM_SEQS, POOL_SLOTS = 160, 3, 5


@dataclasses.dataclass
class Leg:
    """A leg as one worker knows it."""

    leg_id: str
    wants: list[str] = dataclasses.field(default_factory=list)
    ready: dict[str, m.Slot] = dataclasses.field(default_factory=dict)
    num_tokens: int = 0
    prefill_samples: bool = False
    prefilled: bool = False
    pushed: bool = False
    aborted: bool = False


@dataclasses.dataclass
class Asked:
    """A request as its endpoint knows it."""

    submit: m.Submit
    got: list[int] = dataclasses.field(default_factory=list)
    num_prompt_outputs: int = 0
    attempts: int = 0
    ended: str = ""
    finished: bool = False


class UnluckyPeers(RuleBasedStateMachine):
    """One world with all its peers: what they know, and the steps they can take."""

    num_finished = 0
    num_resumed = 0
    num_sampled = 0

    def __init__(self) -> None:
        super().__init__()
        config = BrokerConfig(
            max_queued=6, decode_reserve_tokens=4, pixel_store_bytes=64, max_attempts=4, encode_batches_ahead=1,
            hung_after_s=20,
        )  # fmt: skip
        self.world = World(config)
        self.folder = tempfile.TemporaryDirectory()
        self.world.core = RecordedCore(config, Path(self.folder.name))
        self.live: dict[str, str] = {}  # the incarnation of each name that is there
        self.jobs: dict[str, list[m.EncodeJob]] = {}
        self.legs: dict[str, dict[str, Leg]] = {}  # by incarnation, also of those that are gone
        self.kv: set[str] = set()  # legs whose KV has arrived
        self.asked: dict[str, Asked] = {}
        self.draining: set[str] = set()
        self.said: list[tuple[str, m.Message, list[bytes]]] = []
        self.uploaded: dict[str, bool] = {}  # by id: whether the endpoint was told that it can be read
        self.num_asked = self.num_pools = 0
        for name in ROLE_OF:
            self.come(name)

    # ---- what the core sends -----------------------------------------------------------------------------------------

    def say(self, peer_id: str, message: m.Message, frames: list[bytes] | None = None) -> None:
        self.said = [*self.said[-20:], (peer_id, message, frames or [])]
        self.world.say(peer_id, message, frames)
        self.deliver()

    def wait(self, seconds: float, but: tuple[str, ...] = ()) -> None:
        self.world.wait(seconds, but)
        self.deliver()

    def deliver(self) -> None:
        """Hands what the core has sent to the peers it was sent to; messages to the dead are lost."""
        self.live = {n: p for n, p in self.live.items() if self.world.core.registry.get(p)}
        while self.world.sent:
            peer_id, message, frames = self.world.sent.pop(0)
            if peer_id not in self.live.values():
                continue
            match message:
                case m.Encode():
                    assert peer_id not in self.draining
                    self.jobs.setdefault(peer_id, []).extend(message.jobs)
                case m.Prefill() | m.Decode():
                    assert peer_id not in self.draining
                    self.take_leg(peer_id, message, frames)
                case m.Prefilled():
                    if leg := self.legs[peer_id].get(message.leg_id):
                        assert len(message.token_ids) == leg.prefill_samples
                        leg.prefilled, leg.num_tokens = True, leg.num_tokens + len(message.token_ids)
                case m.Ready():
                    if leg := self.legs[peer_id].get(message.leg_id):
                        leg.ready |= {one.patch_hash: one.slot for one in message.ready}
                case m.Abort():
                    self.legs[peer_id].setdefault(message.leg_id, Leg(message.leg_id)).aborted = True
                case Tokens() | Finished() | m.Failed():
                    self.take_answer(message, frames)
                case m.Uploaded(upload_id=upload_id, code=code):
                    assert code or not self.uploaded[upload_id], "it is said once"
                    self.uploaded[upload_id] |= not code

    def take_leg(self, peer_id: str, message: m.Prefill | m.Decode, frames: list[bytes]) -> None:
        legs = self.legs.setdefault(peer_id, {})
        assert not any(message.leg_id in one for name, one in self.legs.items() if name[0] == peer_id[0]), (
            f"{message.leg_id} was given to two workers of a stage"
        )
        request_id = message.leg_id.partition("~")[0]
        asked = self.asked[request_id]
        assert frames == [b"engine"]
        assert message.output_token_ids == asked.got, "a leg starts after what the client has"
        self.num_resumed_once(asked)
        leg = Leg(message.leg_id, num_tokens=len(message.output_token_ids))
        leg.wants = [patch.patch_hash for patch in asked.submit.patches]
        leg.prefill_samples = message.samples if isinstance(message, m.Prefill) else message.awaits_token
        assert leg.prefill_samples == asked.submit.prefill_samples
        if isinstance(message, m.Prefill):
            leg.ready = {one.patch_hash: one.slot for one in message.ready}
        legs[message.leg_id] = leg

    def num_resumed_once(self, asked: Asked) -> None:
        type(self).num_resumed += bool(asked.got)

    def take_answer(self, message: Tokens | Finished | m.Failed, frames: list[bytes]) -> None:
        asked = self.asked[message.request_id]
        assert not asked.ended, f"{message} after the end: {asked.ended}"
        if isinstance(message, m.Failed):
            if message.code == "pixels_needed" and (asked.submit.resumable or not asked.got):
                asked.attempts += 1
                self.submit(asked, with_pixels=True)
            else:
                asked.ended = f"{message.code}: {message.message}"
            return
        if not message.token_ids:
            asked.num_prompt_outputs += 1
            assert (asked.num_prompt_outputs, frames) == (1, [b"logprobs"])
            return
        asked.got += message.token_ids
        assert asked.got == list(range(len(asked.got)))
        if isinstance(message, Finished):
            asked.ended, asked.finished = "finished", True
            type(self).num_finished += 1
            assert len(asked.got) == asked.submit.max_tokens

    def submit(self, asked: Asked, with_pixels: bool = True) -> None:
        submit = asked.submit
        patches = [
            m.Patch(patch_hash=p.patch_hash, modality=p.modality, num_tokens=p.num_tokens, num_frames=int(with_pixels))
            for p in submit.patches
        ]
        asked.submit = m.Submit(
            request_id=submit.request_id, num_prompt_tokens=submit.num_prompt_tokens, max_tokens=submit.max_tokens,
            num_engine_frames=1, patches=patches, deadline_s=submit.deadline_s, tenant=submit.tenant,
            attempts=asked.attempts, output_token_ids=list(asked.got), resumable=submit.resumable,
            prefill_samples=submit.prefill_samples,
        )  # fmt: skip
        frames = [p.patch_hash.encode() for p in patches if with_pixels]
        self.world.say(self.live["ep"], asked.submit, [b"engine", *frames])

    # ---- peers come and go -------------------------------------------------------------------------------------------

    def come(self, name: str) -> None:
        """A peer (re)starts; an earlier incarnation that is registered is lost by that."""
        role, pools = ROLE_OF[name], []
        if role is Kind.CACHE:
            self.num_pools += 1
            pool_id = f"pool{self.num_pools}"
            pools = [m.Pool(pool_id=pool_id, kind="k", name=pool_id, nbytes=POOL_SLOTS * SLOT_BYTES, host="h")]
        info = {
            Stage.ENCODE: lambda: encode_info(max_batch_tokens=8),
            Stage.PREFILL: lambda: prefill_info(name, kv_capacity_tokens=KV_TOKENS),
            Stage.DECODE: lambda: decode_info(kv_capacity_tokens=KV_TOKENS, max_num_seqs=NUM_SEQS),
        }.get(role, m.WorkerInfo)()
        number = sum(one == name for one in self.world.names.values()) + 1
        self.live[name] = f"{name}#{number}"
        self.legs[self.live[name]] = {}
        assert self.world.join(name, role, info, pools) == self.live[name]
        self.deliver()

    def peer(self, name: str) -> str | None:
        return self.live.get(name)

    def open(self) -> list[Asked]:
        return [one for one in self.asked.values() if not one.ended]

    def restart(self, name: str) -> None:
        self.fail(name)
        self.come(name)
        self.wait(0.5)

    def fail(self, name: str) -> None:
        if peer_id := self.live.pop(name, None):
            self.say(peer_id, m.Goodbye(reason="the engine failed"))

    def leave(self, name: str) -> None:
        if peer_id := self.peer(name):
            self.draining.add(peer_id)
            self.say(peer_id, m.Draining())
            for job in [job for job in self.jobs.pop(peer_id, []) if job.job_id % 2]:
                self.say(peer_id, m.EncodeFailed(job_id=job.job_id, message="draining", dropped=True))
            self.work_once(1)
            if self.live.pop(name, None):
                self.say(peer_id, m.Goodbye(reason="stopped"))

    def fall_silent(self, name: str) -> None:
        if peer_id := self.peer(name):
            self.wait(4.0, but=(peer_id,))
            assert name not in self.live

    def hang(self, name: str) -> None:
        if peer_id := self.peer(name):
            peer = self.world.core.registry.get(peer_id)
            self.world.stuck.add(peer_id)
            holds = bool(peer.num_pending)
            self.wait(0.5)
            if holds and (peer.num_pending) and name in self.live:
                self.wait(21)
                assert name not in self.live or not (peer.num_pending)
            self.world.stuck.discard(peer_id)

    # ---- workers -----------------------------------------------------------------------------------------------------

    def some_leg(self, stage: Stage, data: st.DataObject) -> tuple[str, Leg] | None:
        """A leg of some incarnation of a stage that has not taken in an abort."""
        found = [
            (peer_id, leg)
            for peer_id, legs in sorted(self.legs.items())
            if ROLE_OF[peer_id.partition("#")[0]] is stage
            for leg in legs.values()
        ]
        return data.draw(st.sampled_from(found), label="leg") if found else None

    def gone_or_live_jobs(self) -> list[tuple[str, m.EncodeJob]]:
        return [(peer_id, job) for peer_id, jobs in sorted(self.jobs.items()) for job in jobs]

    def work_once(self, count: int) -> bool:
        """Each live worker makes a step with all it has; false where nobody has anything."""
        moved = False
        for peer_id in list(self.live.values()):
            for job in self.jobs.pop(peer_id, []):
                one = m.EncodedJob(job_id=job.job_id, generation=job.slot.generation)
                self.say(peer_id, m.Encoded(jobs=[one], took_s=0.01))
                moved = True
            for leg in list(self.legs[peer_id].values()):
                is_prefill = ROLE_OF[peer_id.partition("#")[0]] is Stage.PREFILL
                moved |= self.step_prefill(peer_id, leg) if is_prefill else self.step_decode(peer_id, leg, count)
        return moved

    def step_prefill(self, peer_id: str, leg: Leg) -> bool:
        """The next thing that a prefill worker does with a leg; false where there is nothing."""
        if leg.aborted:
            del self.legs[peer_id][leg.leg_id]
            self.say(peer_id, m.Released(leg_id=leg.leg_id))
        elif not leg.prefilled and set(leg.wants) <= set(leg.ready):
            leg.prefilled = True
            self.kv.add(leg.leg_id)
            self.say(peer_id, *self.prefilled(leg))
        elif leg.prefilled:
            del self.legs[peer_id][leg.leg_id]
            self.say(peer_id, m.Pushed(leg_id=leg.leg_id))
        else:
            return False
        return True

    def prefilled(self, leg: Leg) -> tuple[m.Prefilled, list[bytes]]:
        """What a prefill worker says of a leg that is computed: it may have sampled a token, which may be the last."""
        if not leg.prefill_samples:
            return m.Prefilled(leg_id=leg.leg_id), [b"logprobs"]
        asked = self.asked[leg.leg_id.partition("~")[0]]
        reason = "length" if leg.num_tokens + 1 == asked.submit.max_tokens else ""
        type(self).num_sampled += 1
        return m.Prefilled(leg_id=leg.leg_id, token_ids=[leg.num_tokens], finish_reason=reason), [b"out"]

    def step_decode(self, peer_id: str, leg: Leg, count: int) -> bool:
        """The next tokens of a leg on its decode worker; false where there are none yet."""
        if leg.aborted:
            del self.legs[peer_id][leg.leg_id]
            self.say(peer_id, m.Released(leg_id=leg.leg_id))
            return True
        if leg.leg_id not in self.kv or (leg.prefill_samples and not leg.prefilled):
            return False
        asked = self.asked[leg.leg_id.partition("~")[0]]
        before = leg.num_tokens
        leg.num_tokens = min(before + count, asked.submit.max_tokens)
        ids = list(range(before, leg.num_tokens))
        assert ids, "a leg has at least one token to give"
        if leg.num_tokens == asked.submit.max_tokens:
            del self.legs[peer_id][leg.leg_id]
            finished = step(leg.leg_id, token_ids=ids, finish_reason="length", num_before=before)
            self.say(peer_id, finished, [b"out"])
        else:
            self.say(peer_id, step(leg.leg_id, token_ids=ids, num_before=before), [b"out"])
        return True

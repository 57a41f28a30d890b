"""The decision core against peers that behave at random: no sequence of events breaks what must always hold.

`EPD_CORE_STEPS` sets how many events are tried (default 4,000: some seconds). The peers are honest but unlucky: they
die, leave, come back, say things twice and late, and go on with legs that the core has given up. Whatever happens, each
request's tokens arrive in order and once, it ends once, and at the end nothing is held.
"""

from __future__ import annotations

import dataclasses
import os

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from broker.request import State
from epd import messages as m
from epd.config import BrokerConfig
from epd.messages import STAGES, Role
from tests.broker.world import SLOT_BYTES, World, decode_info, encode_info, prefill_info

STEPS = int(os.environ.get("EPD_CORE_STEPS", "4000"))
STEPS_EACH = 60

NAMES = {
    Role.ENCODE: ["e0", "e1"],
    Role.PREFILL: ["p0", "p1"],
    Role.DECODE: ["d0", "d1"],
    Role.CACHE: ["cache"],
    Role.ENDPOINT: ["ep"],
}
ROLE_OF = {name: role for role, names in NAMES.items() for name in names}
HASHES = [f"h{i}" for i in range(7)]
KV_TOKENS, NUM_SEQS, POOL_SLOTS = 160, 3, 5

REQUESTS = st.fixed_dictionaries(
    {
        "tenant": st.sampled_from("abc"),
        "hashes": st.lists(st.sampled_from(HASHES), max_size=3, unique=True),
        "num_prompt_tokens": st.integers(5, 70),
        "max_tokens": st.integers(1, 12),
        "resumable": st.sampled_from([True, True, False]),
        "pixels": st.sampled_from([True, True, False]),
        "deadline_s": st.sampled_from([60.0, 60.0, 3.0]),
    }
)


@dataclasses.dataclass
class Leg:
    """A leg as one worker knows it."""

    leg_id: str
    wants: list[str] = dataclasses.field(default_factory=list)
    ready: dict[str, m.Slot] = dataclasses.field(default_factory=dict)
    num_tokens: int = 0
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


class CoreMachine(RuleBasedStateMachine):
    num_steps = 0
    num_finished = 0
    num_resumed = 0

    def __init__(self) -> None:
        super().__init__()
        config = BrokerConfig(
            max_queued=6, decode_reserve_tokens=4, pixel_store_bytes=64, max_attempts=4, encode_batches_ahead=1,
            hung_after_s=20,
        )  # fmt: skip
        self.world = World(config)
        self.live: dict[str, str] = {}  # the incarnation of each name that is there
        self.jobs: dict[str, list[m.EncodeJob]] = {}
        self.legs: dict[str, dict[str, Leg]] = {}  # by incarnation, also of those that are gone
        self.kv: set[str] = set()  # legs whose KV has arrived
        self.asked: dict[str, Asked] = {}
        self.draining: set[str] = set()
        self.said: list[tuple[str, m.Message, list[bytes]]] = []
        self.num_asked = self.num_pools = 0
        for name in ROLE_OF:
            self.come(name)

    # ---- what the core sends ---------------------------------------------------------------------------------------

    def say(self, peer_id: str, message: m.Message, frames: list[bytes] | None = None) -> None:
        self.said = [*self.said[-20:], (peer_id, message, frames or [])]
        self.world.say(peer_id, message, frames)
        self.deliver()

    def wait(self, seconds: float, but: tuple[str, ...] = ()) -> None:
        self.world.wait(seconds, but)
        self.deliver()

    def deliver(self) -> None:
        """Hands what the core has sent to the peers it was sent to; messages to the dead are lost."""
        self.live = {n: p for n, p in self.live.items() if self.world.core.board.registry.get(p)}
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
                case m.Ready():
                    if leg := self.legs[peer_id].get(message.request_id):
                        leg.ready |= {one.patch_hash: one.slot for one in message.ready}
                case m.Abort():
                    self.legs[peer_id].setdefault(message.request_id, Leg(message.request_id)).aborted = True
                case m.Tokens() | m.Finished() | m.Failed():
                    self.take_answer(message, frames)

    def take_leg(self, peer_id: str, message: m.Prefill | m.Decode, frames: list[bytes]) -> None:
        legs = self.legs.setdefault(peer_id, {})
        assert not any(message.request_id in one for name, one in self.legs.items() if name[0] == peer_id[0]), (
            f"{message.request_id} was given to two workers of a stage"
        )
        request_id = message.request_id.partition("~")[0]
        asked = self.asked[request_id]
        assert frames == [b"engine"]
        assert message.output_token_ids == asked.got, "a leg starts after what the client has"
        self.num_resumed_once(asked)
        leg = Leg(message.request_id, num_tokens=len(message.output_token_ids))
        leg.wants = [patch.patch_hash for patch in asked.submit.patches]
        if isinstance(message, m.Prefill):
            leg.ready = {one.patch_hash: one.slot for one in message.ready}
        legs[message.request_id] = leg

    def num_resumed_once(self, asked: Asked) -> None:
        type(self).num_resumed += bool(asked.got)

    def take_answer(self, message: m.Tokens | m.Finished | m.Failed, frames: list[bytes]) -> None:
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
        if isinstance(message, m.Finished):
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
        )  # fmt: skip
        frames = [p.patch_hash.encode() for p in patches if with_pixels]
        self.world.say(self.live["ep"], asked.submit, [b"engine", *frames])

    # ---- peers -----------------------------------------------------------------------------------------------------

    def come(self, name: str) -> None:
        """A peer (re)starts; an earlier incarnation that is registered is lost by that."""
        role, pools = ROLE_OF[name], []
        if role is Role.CACHE:
            self.num_pools += 1
            pool_id = f"pool{self.num_pools}"
            pools = [m.Pool(pool_id=pool_id, kind="k", name=pool_id, nbytes=POOL_SLOTS * SLOT_BYTES, host="h")]
        info = {
            Role.ENCODE: lambda: encode_info(max_batch_tokens=8),
            Role.PREFILL: lambda: prefill_info(name, kv_capacity_tokens=KV_TOKENS),
            Role.DECODE: lambda: decode_info(kv_capacity_tokens=KV_TOKENS, max_num_seqs=NUM_SEQS),
        }.get(role, m.WorkerInfo)()
        number = sum(one == name for one in self.world.names.values()) + 1
        self.live[name] = f"{name}#{number}"
        self.legs[self.live[name]] = {}
        assert self.world.join(name, role, info, pools) == self.live[name]
        self.deliver()

    def peer(self, name: str) -> str | None:
        return self.live.get(name)

    def some_leg(self, stage: Role, data: st.DataObject) -> tuple[str, Leg] | None:
        """A leg of some incarnation of a stage that has not taken in an abort."""
        found = [
            (peer_id, leg)
            for peer_id, legs in sorted(self.legs.items())
            if ROLE_OF[peer_id.partition("#")[0]] is stage
            for leg in legs.values()
        ]
        return data.draw(st.sampled_from(found), label="leg") if found else None

    # ---- rules: endpoints ------------------------------------------------------------------------------------------

    @precondition(lambda self: "ep" in self.live)
    @rule(requests=st.lists(REQUESTS, min_size=1, max_size=4))
    def ask(self, requests: list[dict]) -> None:
        """New requests; some come without pixels, as the endpoint believes that their patches are in the cache."""
        for one in requests:
            self.num_asked += 1
            request_id = f"r{self.num_asked}"
            patches = [m.Patch(patch_hash=h, modality="image", num_tokens=4) for h in one["hashes"]]
            rest = {key: value for key, value in one.items() if key not in ("hashes", "pixels")}
            self.asked[request_id] = Asked(
                m.Submit(request_id=request_id, num_engine_frames=1, patches=patches, **rest)
            )
            self.submit(self.asked[request_id], with_pixels=one["pixels"])
            self.deliver()

    @precondition(lambda self: "ep" in self.live)
    @rule(requests=st.lists(REQUESTS, min_size=2, max_size=6))
    def ask_more(self, requests: list[dict]) -> None:
        self.ask(requests)

    @precondition(lambda self: "ep" in self.live and self.open())
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        asked = data.draw(st.sampled_from(self.open()))
        asked.ended = "cancelled"
        self.say(self.live["ep"], m.Cancel(request_id=asked.submit.request_id))

    @precondition(lambda self: "ep" in self.live and self.open())
    @rule(data=st.data())
    def submit_twice(self, data: st.DataObject) -> None:
        asked = data.draw(st.sampled_from(self.open()))
        before = len(self.world.core.board.requests)
        num_fenced = self.world.core.board.counters().num_fenced
        self.world.say(self.live["ep"], asked.submit, [b"engine", *([b"x"] * len(asked.submit.patches))])
        assert not [s for s in self.world.sent if isinstance(s.message, m.Failed)]
        assert self.world.core.board.counters().num_fenced == num_fenced + 1
        assert len(self.world.core.board.requests) == before
        self.deliver()

    @rule()
    def endpoint_returns(self) -> None:
        """It registers anew, and submits again what its clients still wait for and what can go on."""
        self.come("ep")
        for asked in self.open():
            if asked.got and not asked.submit.resumable:
                asked.ended = "lost with the broker"
                continue
            asked.attempts += 1
            asked.num_prompt_outputs = 0
            self.submit(asked)
            self.deliver()

    def open(self) -> list[Asked]:
        return [one for one in self.asked.values() if not one.ended]

    # ---- rules: peers come and go ----------------------------------------------------------------------------------

    @rule(
        kind=st.sampled_from(["restart", "come", "restart", "fail", "leave", "fall_silent", "hang"]),
        name=st.sampled_from([name for name, role in ROLE_OF.items() if role is not Role.ENDPOINT]),
    )
    def trouble(self, kind: str, name: str) -> None:
        if ROLE_OF[name] in STAGES or kind not in ("leave", "hang"):
            getattr(self, kind)(name)

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
            self.work(1)
            if self.live.pop(name, None):
                self.say(peer_id, m.Goodbye(reason="stopped"))

    def fall_silent(self, name: str) -> None:
        if peer_id := self.peer(name):
            self.wait(4.0, but=(peer_id,))
            assert name not in self.live

    def hang(self, name: str) -> None:
        if peer_id := self.peer(name):
            peer = self.world.core.board.registry.get(peer_id)
            self.world.stuck.add(peer_id)
            holds = bool(peer.jobs or peer.requests)
            self.wait(0.5)
            if holds and (peer.jobs or peer.requests) and name in self.live:
                self.wait(21)
                assert name not in self.live or not (peer.jobs or peer.requests)
            self.world.stuck.discard(peer_id)

    @rule(seconds=st.sampled_from([0.25, 1.0, 3.0]))
    def pass_time(self, seconds: float) -> None:
        self.wait(seconds)

    # ---- rules: workers --------------------------------------------------------------------------------------------

    def gone_or_live_jobs(self) -> list[tuple[str, m.EncodeJob]]:
        return [(peer_id, job) for peer_id, jobs in sorted(self.jobs.items()) for job in jobs]

    @precondition(lambda self: any(self.jobs.values()))
    @rule(data=st.data(), how=st.sampled_from(["encoded", "encoded", "encoded", "failed", "dropped"]))
    def encode(self, data: st.DataObject, how: str) -> None:
        peer_id, job = data.draw(st.sampled_from(self.gone_or_live_jobs()), label="job")
        self.jobs[peer_id].remove(job)
        if how == "encoded":
            one = m.EncodedJob(job_id=job.job_id, generation=job.slot.generation)
            self.say(peer_id, m.Encoded(jobs=[one], took_s=0.01))
        else:
            self.say(peer_id, m.EncodeFailed(job_id=job.job_id, message="no", dropped=how == "dropped"))

    @rule(data=st.data())
    def prefill(self, data: st.DataObject) -> None:
        if found := self.some_leg(Role.PREFILL, data):
            self.step_prefill(*found)

    def step_prefill(self, peer_id: str, leg: Leg) -> bool:
        """The next thing that a prefill worker does with a leg; false where there is nothing."""
        if leg.aborted:
            del self.legs[peer_id][leg.leg_id]
            self.say(peer_id, m.Released(request_id=leg.leg_id))
        elif not leg.prefilled and set(leg.wants) <= set(leg.ready):
            leg.prefilled = True
            self.kv.add(leg.leg_id)
            self.say(peer_id, m.Prefilled(request_id=leg.leg_id), [b"logprobs"])
        elif leg.prefilled:
            del self.legs[peer_id][leg.leg_id]
            self.say(peer_id, m.Pushed(request_id=leg.leg_id))
        else:
            return False
        return True

    @rule(rounds=st.integers(1, 4))
    def work(self, rounds: int) -> None:
        """All workers that are there do what they have to do, a little of it."""
        for _ in range(rounds):
            self.work_once(1)

    @rule(rounds=st.integers(2, 5))
    def work_on(self, rounds: int) -> None:
        self.work(rounds)

    @rule(rounds=st.integers(3, 6), name=st.sampled_from(["p0", "p1", "d0", "d1", "d0", "d1"]))
    def work_and_lose_one(self, rounds: int, name: str) -> None:
        self.work(rounds)
        self.fail(name)
        self.wait(0.5)

    def work_once(self, count: int) -> bool:
        """Each live worker makes a step with all it has; false where nobody has anything."""
        moved = False
        for peer_id in list(self.live.values()):
            for job in self.jobs.pop(peer_id, []):
                one = m.EncodedJob(job_id=job.job_id, generation=job.slot.generation)
                self.say(peer_id, m.Encoded(jobs=[one], took_s=0.01))
                moved = True
            for leg in list(self.legs[peer_id].values()):
                is_prefill = ROLE_OF[peer_id.partition("#")[0]] is Role.PREFILL
                moved |= self.step_prefill(peer_id, leg) if is_prefill else self.step_decode(peer_id, leg, count)
        return moved

    @rule(data=st.data())
    def kv_arrives_before_the_broker_knows(self, data: st.DataObject) -> None:
        found = self.some_leg(Role.PREFILL, data)
        if found and set(found[1].wants) <= set(found[1].ready) and found[0] in self.live.values():
            self.kv.add(found[1].leg_id)

    @rule(data=st.data())
    def find_a_slot_stale(self, data: st.DataObject) -> None:
        found = self.some_leg(Role.PREFILL, data)
        if found and found[1].ready and not found[1].prefilled and found[1].leg_id not in self.kv:
            peer_id, leg = found
            patch_hash = sorted(leg.ready)[0]
            slot = leg.ready.pop(patch_hash)
            stale = m.Stale(request_id=leg.leg_id, patch_hash=patch_hash, generation=slot.generation, reason="checksum")
            self.say(peer_id, stale)

    @rule(data=st.data(), count=st.integers(1, 2))
    def decode(self, data: st.DataObject, count: int) -> None:
        if found := self.some_leg(Role.DECODE, data):
            self.step_decode(*found, count)

    def step_decode(self, peer_id: str, leg: Leg, count: int) -> bool:
        """The next tokens of a leg on its decode worker; false where there are none yet."""
        if leg.aborted:
            del self.legs[peer_id][leg.leg_id]
            self.say(peer_id, m.Released(request_id=leg.leg_id))
            return True
        if leg.leg_id not in self.kv:
            return False
        asked = self.asked[leg.leg_id.partition("~")[0]]
        before = leg.num_tokens
        leg.num_tokens = min(before + count, asked.submit.max_tokens)
        ids = list(range(before, leg.num_tokens))
        assert ids, "a leg has at least one token to give"
        if leg.num_tokens == asked.submit.max_tokens:
            del self.legs[peer_id][leg.leg_id]
            finished = m.Finished(request_id=leg.leg_id, token_ids=ids, finish_reason="length", num_before=before)
            self.say(peer_id, finished, [b"out"])
        else:
            self.say(peer_id, m.Tokens(request_id=leg.leg_id, token_ids=ids, num_before=before), [b"out"])
        return True

    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        found = self.some_leg(Role.DECODE, data)
        if found and found[1].leg_id in self.kv and found[1].wants:
            self.say(found[0], m.NeedPatches(request_id=found[1].leg_id, patch_hashes=found[1].wants))

    @rule(data=st.data(), stage=st.sampled_from([Role.PREFILL, Role.DECODE]), code=st.sampled_from(["engine_failed"]))
    def fail_a_request(self, data: st.DataObject, stage: Role, code: str) -> None:
        if found := self.some_leg(stage, data):
            peer_id, leg = found
            del self.legs[peer_id][leg.leg_id]
            self.say(peer_id, m.Failed(request_id=leg.leg_id, code=code, message="no"))
            if leg.aborted:
                self.say(peer_id, m.Released(request_id=leg.leg_id))

    @precondition(lambda self: self.said)
    @rule(data=st.data())
    def say_twice(self, data: st.DataObject) -> None:
        """A worker's message arrives a second time, at once or later."""
        twice = [one for one in self.said if ROLE_OF[one[0].partition("#")[0]] in STAGES]
        if twice:
            peer_id, message, frames = data.draw(st.sampled_from(twice), label="again")
            if not isinstance(message, m.Goodbye | m.Draining):
                self.world.say(peer_id, message, frames)
                self.deliver()

    # ---- what always holds -----------------------------------------------------------------------------------------

    @invariant()
    def all_adds_up(self) -> None:
        type(self).num_steps += 1
        board = self.world.core.board
        requests = list(board.requests.values())
        assert board.legs == {one.leg_id: one for one in requests}
        assert {one for one in board.queue} == {one.request_id for one in requests if one.state is State.QUEUED}
        assert board.frames_bytes == sum(one.frames_bytes for one in requests)
        assert set(board.requests) == {one.submit.request_id for one in self.open()}, "each open request is in flight"
        for peer in board.registry.of(Role.DECODE):
            mine = [one for one in requests if one.decode == peer.peer_id]
            assert peer.requests == {one.leg_id for one in mine}
            assert peer.load_tokens == sum(one.reserved_tokens for one in mine)
            assert len(mine) <= NUM_SEQS
            assert peer.load_tokens <= KV_TOKENS or len(mine) == 1
        for peer in board.registry.of(Role.PREFILL):
            mine = [one for one in requests if one.prefill == peer.peer_id and not one.prefilled]
            assert peer.requests == {one.leg_id for one in mine}
            assert peer.load_tokens == sum(one.prompt_tokens for one in mine)
        for peer in board.registry.of(Role.ENCODE):
            jobs = [board.patches.queue.get(job_id) for job_id in peer.jobs]
            assert all(job is not None and job.worker == peer.peer_id for job in jobs)
            assert peer.load_tokens == sum(job.num_tokens for job in jobs if job)

    @invariant()
    def pins_match_their_holders(self) -> None:
        board, index = self.world.core.board, self.world.core.board.patches.index
        holders = {holder for patch_hash in HASHES for holder in index.holders(patch_hash)}
        assert holders <= board.legs.keys() | board.releasing.keys()
        for one in board.requests.values():
            if one.state is State.PREFILLING and not one.prefilled:
                for patch_hash in one.patches:
                    assert one.leg_id in index.holders(patch_hash)
                    assert index.slot(patch_hash) is not None

    # ---- the end ---------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """With all peers there and well, every request ends, and then nothing is held."""
        self.world.stuck.clear()
        for name in ROLE_OF:
            if name not in self.live or self.live[name] in self.draining:
                if name == "ep":
                    self.endpoint_returns()
                else:
                    self.come(name)
        for _ in range(100):
            if not self.work_once(9) and not self.world.core.board.requests:
                break
            self.wait(0.25)
        assert not any(self.legs[peer_id] for peer_id in self.live.values()), "each leg was ended or aborted"
        assert not self.open(), [(one, self.world.core.board.requests) for one in self.open()]
        self.wait(61)  # the quarantine is over
        self.world.assert_idle()
        assert not self.world.core.board.legs
        assert self.world.core.board.counters().cache_bytes_pinned == 0
        assert self.world.core.board.counters().cache_bytes_quarantined == 0


@pytest.mark.timeout(3600)
def test_no_sequence_of_events_breaks_the_core() -> None:
    CoreMachine.num_steps = CoreMachine.num_finished = CoreMachine.num_resumed = 0
    run_state_machine_as_test(
        CoreMachine,
        settings=settings(
            max_examples=max(1, STEPS // STEPS_EACH),
            stateful_step_count=STEPS_EACH,
            deadline=None,
            database=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )
    print(f"{CoreMachine.num_steps} events, {CoreMachine.num_finished} answers, {CoreMachine.num_resumed} continued")
    assert CoreMachine.num_finished

"""The decision core against peers that behave at random: no sequence of events breaks what must always hold.

`EPD_CORE_STEPS` sets how many events are tried (default 4,000: some seconds). The peers are honest but unlucky: they
die, leave, come back, say things twice and late, and go on with legs that the core has given up. Whatever happens, each
request's tokens arrive in order and once, it ends once, and at the end nothing is held.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule, run_state_machine_as_test

from broker.core.request import State
from epd import messages as m
from epd.messages import Kind, Stage
from tests.broker.unlucky_peers import HASHES, KV_TOKENS, NUM_SEQS, ROLE_OF, Asked, UnluckyPeers

STEPS = int(os.environ.get("EPD_CORE_STEPS", "4000"))
STEPS_EACH = 60

REQUESTS = st.fixed_dictionaries(
    {
        "tenant": st.sampled_from("abc"),
        "hashes": st.lists(st.sampled_from(HASHES), max_size=3, unique=True),
        "num_prompt_tokens": st.integers(5, 70),
        "max_tokens": st.integers(1, 12),
        "going_on": st.sampled_from([(True, True), (True, False), (False, False)]),
        "pixels": st.sampled_from([True, True, False]),
        "deadline_s": st.sampled_from([60.0, 60.0, 3.0]),
    }
)


class CoreMachine(UnluckyPeers):
    num_steps = 0

    # ---- rules: the endpoint -----------------------------------------------------------------------------------------

    @precondition(lambda self: "ep" in self.live)
    @rule(requests=st.lists(REQUESTS, min_size=1, max_size=4))
    def ask(self, requests: list[dict]) -> None:
        """New requests; some come without pixels, as the endpoint believes that their patches are in the cache."""
        for one in requests:
            self.num_asked += 1
            request_id = f"r{self.num_asked}"
            patches = [m.Patch(patch_hash=h, modality="image", num_tokens=4) for h in one["hashes"]]
            rest = {key: value for key, value in one.items() if key not in ("hashes", "pixels", "going_on")}
            rest["resumable"], rest["prefill_samples"] = one["going_on"]
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
        before = len(self.world.core.requests)
        num_fenced = self.world.core.counters().num_fenced
        self.world.say(self.live["ep"], asked.submit, [b"engine", *([b"x"] * len(asked.submit.patches))])
        assert not [s for s in self.world.sent if isinstance(s.message, m.Failed)]
        assert self.world.core.counters().num_fenced == num_fenced + 1
        assert len(self.world.core.requests) == before
        self.deliver()

    @precondition(lambda self: "ep" in self.live)
    @rule(
        hashes=st.lists(st.sampled_from(HASHES), min_size=1, max_size=2, unique=True),
        pixels=st.sampled_from([True, True, False]),
        ttl_s=st.sampled_from([2.0, 8.0]),
    )
    def upload(self, hashes: list[str], pixels: bool, ttl_s: float) -> None:
        upload_id = f"u{len(self.uploaded)}"
        self.uploaded[upload_id] = False
        patches = [m.Patch(patch_hash=h, modality="image", num_tokens=4, num_frames=int(pixels)) for h in hashes]
        frames = [h.encode() for h in hashes if pixels]
        self.say(self.live["ep"], m.Upload(upload_id=upload_id, patches=patches, ttl_s=ttl_s), frames)

    @precondition(lambda self: "ep" in self.live and self.uploaded)
    @rule(data=st.data())
    def drop_upload(self, data: st.DataObject) -> None:
        upload_id = data.draw(st.sampled_from(sorted(self.uploaded)))
        self.say(self.live["ep"], m.DropUpload(upload_id=upload_id))

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

    # ---- rules: peers come and go ------------------------------------------------------------------------------------

    @rule(
        kind=st.sampled_from(["restart", "come", "restart", "fail", "leave", "fall_silent", "hang"]),
        name=st.sampled_from([name for name, role in ROLE_OF.items() if role is not Kind.ENDPOINT]),
    )
    def trouble(self, kind: str, name: str) -> None:
        if ROLE_OF[name] in Stage or kind not in ("leave", "hang"):
            getattr(self, kind)(name)

    @rule(seconds=st.sampled_from([0.25, 1.0, 3.0]))
    def pass_time(self, seconds: float) -> None:
        self.wait(seconds)

    # ---- rules: workers ----------------------------------------------------------------------------------------------

    @precondition(lambda self: any(self.jobs.values()))
    @rule(data=st.data(), how=st.sampled_from(["encoded", "encoded", "encoded", "failed", "dropped", "unstored"]))
    def encode(self, data: st.DataObject, how: str) -> None:
        peer_id, job = data.draw(st.sampled_from(self.gone_or_live_jobs()), label="job")
        self.jobs[peer_id].remove(job)
        if how == "encoded":
            one = m.EncodedJob(job_id=job.job_id, generation=job.slot.generation)
            self.say(peer_id, m.Encoded(jobs=[one], took_s=0.01))
        else:
            why = {how: True} if how != "failed" else {}
            self.say(peer_id, m.EncodeFailed(job_id=job.job_id, message="no", **why))

    @rule(data=st.data())
    def prefill(self, data: st.DataObject) -> None:
        if found := self.some_leg(Stage.PREFILL, data):
            self.step_prefill(*found)

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

    @rule(data=st.data())
    def kv_arrives_before_the_broker_knows(self, data: st.DataObject) -> None:
        found = self.some_leg(Stage.PREFILL, data)
        if found and set(found[1].wants) <= set(found[1].ready) and found[0] in self.live.values():
            self.kv.add(found[1].leg_id)

    @rule(data=st.data())
    def find_a_slot_stale(self, data: st.DataObject) -> None:
        found = self.some_leg(Stage.PREFILL, data)
        if found and found[1].ready and not found[1].prefilled and found[1].leg_id not in self.kv:
            peer_id, leg = found
            patch_hash = sorted(leg.ready)[0]
            slot = leg.ready.pop(patch_hash)
            stale = m.Stale(leg_id=leg.leg_id, patch_hash=patch_hash, generation=slot.generation, reason="checksum")
            self.say(peer_id, stale)

    @rule(data=st.data(), count=st.integers(1, 2))
    def decode(self, data: st.DataObject, count: int) -> None:
        if found := self.some_leg(Stage.DECODE, data):
            self.step_decode(*found, count)

    @rule(data=st.data())
    def preempt(self, data: st.DataObject) -> None:
        found = self.some_leg(Stage.DECODE, data)
        if found and found[1].leg_id in self.kv and found[1].wants:
            self.say(found[0], m.NeedPatches(leg_id=found[1].leg_id, patch_hashes=found[1].wants))

    @rule(data=st.data(), stage=st.sampled_from([Stage.PREFILL, Stage.DECODE]), code=st.sampled_from(["engine_failed"]))
    def fail_a_request(self, data: st.DataObject, stage: Stage, code: str) -> None:
        if found := self.some_leg(stage, data):
            peer_id, leg = found
            del self.legs[peer_id][leg.leg_id]
            self.say(peer_id, m.LegFailed(leg_id=leg.leg_id, code=code, message="no"))
            if leg.aborted:
                self.say(peer_id, m.Released(leg_id=leg.leg_id))

    @precondition(lambda self: self.said)
    @rule(data=st.data())
    def say_twice(self, data: st.DataObject) -> None:
        """A worker's message arrives a second time, at once or later."""
        twice = [one for one in self.said if ROLE_OF[one[0].partition("#")[0]] in Stage]
        if twice:
            peer_id, message, frames = data.draw(st.sampled_from(twice), label="again")
            if not isinstance(message, m.Goodbye | m.Draining):
                self.world.say(peer_id, message, frames)
                self.deliver()

    # ---- what always holds -------------------------------------------------------------------------------------------

    @invariant()
    def all_adds_up(self) -> None:
        type(self).num_steps += 1
        core = self.world.core
        requests = list(core.requests.values())
        assert core.legs.by_id == {one.leg.leg_id: one.leg for one in requests}
        assert {one for one in core.queue} == {one.request_id for one in requests if one.state is State.QUEUED}
        assert core.ledger.held_bytes == sum(one.frames_bytes for one in [*requests, *core.uploads.by_id.values()])
        for one in requests:
            frames = [*one.engine_frames, *(frame for each in one.patch_frames.values() for frame in each)]
            assert one.frames_bytes == sum(map(len, frames))
        assert set(core.requests) == {one.submit.request_id for one in self.open()}, "each open request is in flight"
        for peer in core.registry.endpoints.values():
            assert peer.requests == {one.request_id: one for one in requests if one.endpoint is peer}
        for peer in core.registry.serving(Stage.DECODE):
            mine = [one.leg for one in requests if one.leg.decode is peer]
            assert set(peer.legs) == set(mine)
            assert peer.kv_tokens_reserved == sum(one.reserved_tokens for one in mine)
            assert len(mine) <= NUM_SEQS
            assert peer.kv_tokens_reserved <= KV_TOKENS or len(mine) == 1
        for peer in core.registry.serving(Stage.PREFILL):
            mine = [one.leg for one in requests if one.leg.prefill is peer and not one.leg.prefilled]
            assert set(peer.prefilling) == set(mine)
            assert peer.tokens_to_prefill == sum(one.num_tokens for one in mine)
            assert set(peer.legs) == {
                one.leg for one in requests if one.leg.prefill is peer and not (one.leg.prefilled and one.leg.pushed)
            }
        for peer in core.registry.serving(Stage.ENCODE):
            assert all(
                core.patches.queue.get(job_id) is job and job.worker is peer for job_id, job in peer.jobs.items()
            )
            assert peer.embeddings_to_encode == sum(job.num_tokens for job in peer.jobs.values())
        for peer in core.registry.workers.values():
            assert set(peer.owes) == {
                leg_id for leg_id, one in core.legs.endings.items() if peer.peer_id in one.workers
            }
            assert (peer.hang_check is not None) or not peer.num_pending

    @invariant()
    def what_is_kept_sorted_is_what_there_is(self) -> None:
        """Loads, choices and totals are changed where something changes: here they are looked at as a whole."""
        core = self.world.core
        for stage in Stage:
            known = core.stages[stage]
            there = [one for one in core.registry.serving(stage) if not one.draining]
            assert list(known) == there
            ranks = [(known.choice.rank(one), number) for number, one in enumerate(there)]
            assert list(known._everywhere) == [there[number] for _, number in sorted(ranks)]
            assert known.most_room == max((one.room_units for one in there), default=0)

    @invariant()
    def nobody_waits_for_what_is_there(self) -> None:
        """The queues are looked at only when something has changed: looking again now would give nothing."""
        core, now = self.world.core, self.world.now
        if (request_id := core.queue.next(core._liveness.blocked)) is not None:
            assert core._admission._start(core.requests[request_id], now) is not None, f"{request_id} could be started"
        core.patches.queue.workers_changed()
        assert not list(core.patches.dispatch()), "a patch could have been given to a worker"

    @invariant()
    def pins_match_their_holders(self) -> None:
        core, index = self.world.core, self.world.core.patches.index
        holders = {holder for patch_hash in HASHES for holder in index.holders(patch_hash)}
        legs = [*core.legs.by_id.values(), *(one.leg for one in core.legs.endings.values())]
        assert holders <= {*legs, *core.uploads.by_id.values()}
        for one in core.uploads.by_id.values():
            assert index.holds(one) == (not one.frames), "it waits with its pixels, or is pinned without them"
            assert one.endpoint.peer_id == self.live["ep"]
        assert core.uploads.num_pins == sum(one.num_pins for one in core.uploads.by_id.values())
        for one in core.requests.values():
            if one.state is State.PREFILLING and not one.leg.prefilled:
                for patch_hash in one.patches:
                    assert one.leg in index.holders(patch_hash)
                    assert index.slot(patch_hash) is not None

    # ---- the end -----------------------------------------------------------------------------------------------------

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
            if not self.work_once(9) and not self.world.core.requests:
                break
            self.wait(0.25)
        assert not any(self.legs[peer_id] for peer_id in self.live.values()), "each leg was ended or aborted"
        assert not self.open(), [(one, self.world.core.requests) for one in self.open()]
        self.wait(61)  # the quarantine is over
        self.world.assert_idle()
        assert not self.world.core.legs.by_id
        assert self.world.core.counters().cache_bytes_pinned == 0
        assert self.world.core.counters().cache_bytes_quarantined == 0
        with self.folder:
            assert self.world.core.replayed().first_difference == 0, "the same events give the same decisions"


@pytest.mark.timeout(3600)
def test_no_sequence_of_events_breaks_the_core() -> None:
    CoreMachine.num_steps = CoreMachine.num_finished = CoreMachine.num_resumed = CoreMachine.num_sampled = 0
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
    assert CoreMachine.num_sampled

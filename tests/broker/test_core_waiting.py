"""Stages that are away for a while, workers that leave in good order, and engines that hang."""

from __future__ import annotations

import pytest

from epd import messages as m
from epd.config import BrokerConfig
from epd.messages import Kind, Stage
from tests.broker.world import Finished, Tokens, World, decode_info, encode_info, prefill_info, step

INFO = {Stage.ENCODE: encode_info(), Stage.PREFILL: prefill_info("new"), Stage.DECODE: decode_info()}


def pool(pool_id: str = "pool2") -> m.Pool:
    return m.Pool(pool_id=pool_id, kind="shared_memory", name=pool_id, nbytes=1 << 20, host="h")


@pytest.mark.parametrize("role", [Stage.ENCODE, Stage.PREFILL, Stage.DECODE])
def test_requests_wait_for_a_stage_that_was_there_a_moment_ago(role: Stage) -> None:
    world = World()
    world.pipeline()
    for peer_id in {Stage.ENCODE: world.e, Stage.PREFILL: world.p, Stage.DECODE: world.d}[role]:
        world.say(peer_id, m.Goodbye(reason="killed"))
    world.submit("r", ["a"])
    world.wait(20)
    assert world.take(m.Failed) == []
    assert world.take(m.Prefill) == []
    world.join("new", role, INFO[role])
    assert [one.leg_id for one in world.take(m.Prefill)] == ["r"]


@pytest.mark.parametrize("role", [Stage.ENCODE, Stage.PREFILL, Stage.DECODE])
def test_requests_that_wait_for_a_stage_fail_when_it_stays_away(role: Stage) -> None:
    world = World()
    world.pipeline()
    for peer_id in {Stage.ENCODE: world.e, Stage.PREFILL: world.p, Stage.DECODE: world.d}[role]:
        world.say(peer_id, m.Goodbye(reason="killed"))
    world.submit("r", ["a"])
    world.wait(world.config.absence_grace_s)
    [failed] = world.take(m.Failed)
    assert (failed.request_id, failed.code) == ("r", "worker_lost")
    assert f"the last {role} worker" in failed.message
    world.submit("late", ["a"])
    assert [one.code for one in world.take(m.Failed)] == ["not_ready"]
    world.assert_idle()


def test_a_broker_that_has_just_started_waits_for_its_workers() -> None:
    world = World()
    world.endpoint = world.join("ep", Kind.ENDPOINT)
    world.submit("r", ["a"])
    world.join("cache", Kind.CACHE, pools=[pool()])
    for role in (Stage.PREFILL, Stage.DECODE, Stage.ENCODE):
        assert world.take(m.Prefill) == []
        world.join(str(role), role, INFO[role])
    assert len(world.take(m.Prefill)) == 1
    assert world.take(m.Failed) == []


def test_requests_with_pictures_wait_for_the_cache_and_text_passes_them_by() -> None:
    world = World()
    world.pipeline()
    world.say(world.cache, m.Goodbye())
    world.submit("picture", ["a"])
    world.submit("text")
    assert [one.leg_id for one in world.take(m.Prefill)] == ["text"]
    world.join("cache", Kind.CACHE, pools=[pool()])
    assert [one.leg_id for one in world.take(m.Prefill)] == ["picture"]


def test_a_request_that_does_not_fit_the_cache_that_came_back_is_told_so() -> None:
    world = World()
    world.pipeline()
    world.say(world.cache, m.Goodbye())
    world.submit("r", ["a", "b"])
    small = m.Pool(pool_id="small", kind="shared_memory", name="small", nbytes=128, host="h")
    world.join("cache", Kind.CACHE, pools=[small])
    assert [one.code for one in world.take(m.Failed)] == ["too_large"]
    world.assert_idle()


def test_an_encode_worker_and_a_cache_that_are_both_lost_leave_no_trace_of_each_other() -> None:
    world = World()
    world.pipeline()
    world.submit("r", ["a"])
    [job] = world.take_jobs()
    world.say(world.cache, m.Goodbye())
    world.join("cache", Kind.CACHE, pools=[pool()])
    world.wait(0.5)
    [again] = world.take_jobs()
    assert again.message.slot.pool_id == "pool2"
    world.say(job.peer_id, m.Goodbye(reason="killed"))
    if again.peer_id == job.peer_id:
        [again] = world.take_jobs()
    world.say_encoded(again.peer_id, again.message)
    assert world.take(m.Ready)
    assert world.take(m.Failed) == []


# ---- leaving in good order -------------------------------------------------------------------------------------------


def test_a_draining_worker_gets_nothing_new_and_finishes_what_it_has() -> None:
    world = World()
    world.pipeline(encode=0, prefill=2, decode=2)
    world.submit("r1")
    [first] = world.take_sends(m.Decode)
    world.say(first.peer_id, m.Draining())
    for i in range(4):
        world.submit(f"more{i}")
    assert first.peer_id not in {send.peer_id for send in world.take_sends(m.Decode)}
    [status] = [send.message for send in world.take_sends(m.Status)][-1:]
    assert [worker.name for worker in status.workers if worker.draining] == [first.peer_id.partition("#")[0]]
    prefill = world.core.requests["r1"].leg.prefill.peer_id
    world.finish("r1", prefill, first.peer_id)
    assert len(world.take(Finished)) == 1
    world.say(first.peer_id, m.Goodbye(reason="stopped"))
    assert world.take(m.Failed) == []


def test_patches_that_a_draining_encode_worker_hands_back_go_to_the_others_at_once() -> None:
    world = World()
    world.pipeline()
    world.submit("r", ["a", "b", "c", "d"])
    mine = [send.message for send in world.take_jobs() if send.peer_id == world.e[0]]
    world.say(world.e[0], m.Draining())
    for job in mine:
        world.say(world.e[0], m.EncodeFailed(job_id=job.job_id, message="draining", dropped=True))
    again = world.take_jobs()
    assert [send.message.patch_hash for send in again] == [job.patch_hash for job in mine]
    assert {send.peer_id for send in again} == {world.e[1]}
    assert world.core.patches.queue.get(mine[0].job_id).num_attempts == 1, "it is not to blame"


def test_a_stage_whose_last_worker_is_draining_is_waited_for() -> None:
    world = World()
    world.pipeline()
    world.say(world.d[0], m.Draining())
    world.submit("r")
    world.say(world.d[0], m.Goodbye(reason="stopped"))
    world.wait(5)
    assert world.take(m.Failed) == []
    world.join("d0", Stage.DECODE, decode_info())
    assert len(world.take(m.Decode)) == 1


def test_a_patch_is_not_blamed_for_workers_that_left_in_good_order() -> None:
    world = World()
    world.pipeline(encode=1)
    world.submit("r", ["a"])
    for _ in range(4):
        [send] = world.take_jobs()
        world.say(send.peer_id, m.Draining())
        world.say(send.peer_id, m.Goodbye(reason="stopped"))
        world.join("e0", Stage.ENCODE, encode_info())
    assert world.take(m.Failed) == []


# ---- hanging ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["e", "p", "d"])
def test_a_worker_whose_engine_makes_no_step_is_lost_although_it_answers(stage: str) -> None:
    world = World(BrokerConfig(hung_after_s=10))
    world.pipeline(prefill=2, decode=2)
    world.submit("r", ["a"])
    request = world.core.requests["r"]
    [job] = world.take_jobs()
    hung = {"e": job.peer_id, "p": request.leg.prefill.peer_id, "d": request.leg.decode.peer_id}[stage]
    world.stuck.add(hung)
    world.wait(9)
    assert world.core.registry.get(hung)
    world.wait(3)
    assert world.core.registry.get(hung) is None
    world.say(hung, m.Heartbeat())
    assert world.take(m.Unknown, hung), "it has to register again"
    if stage == "e":
        assert [send.message.patch_hash for send in world.take_jobs()] == ["a"]
    else:
        [retried] = [line for line in request.story if line.event == "retried"]
        assert "its engine hangs" in retried.detail


def test_an_idle_worker_makes_no_steps_and_is_not_lost() -> None:
    world = World(BrokerConfig(hung_after_s=10))
    world.pipeline()
    world.stuck.update([*world.e, *world.p, *world.d])
    world.wait(100)
    assert len(world.core.registry.serving(Stage.DECODE)) == 1
    world.submit("r")
    world.wait(8)
    assert len(world.core.registry.serving(Stage.DECODE)) == 1, "it is given its time from when it was given work"


def test_a_worker_that_does_not_take_in_an_abort_is_lost_and_what_it_pinned_is_free() -> None:
    world = World(BrokerConfig(hung_after_s=10))
    world.pipeline()
    world.submit("r", ["a"])
    world.encode_all()
    world.say(world.endpoint, m.Cancel(request_id="r"))
    world.say(world.d[0], m.Released(leg_id="r"))
    world.stuck.add(world.p[0])
    world.wait(11)
    assert world.core.registry.get(world.p[0]) is None
    world.assert_idle()


# ---- gaps and repetitions --------------------------------------------------------------------------------------------


def test_tokens_that_come_twice_are_passed_on_once() -> None:
    world = World()
    world.pipeline()
    world.submit("r")
    world.say(world.p[0], m.Prefilled(leg_id="r"))
    for _ in range(2):
        world.say(world.d[0], step("r", token_ids=[1], num_before=0), [b"x"])
    assert len(world.take(Tokens, world.endpoint)) == 1
    assert world.core.counters().num_fenced == 1


def test_after_a_gap_in_its_tokens_a_request_goes_on_from_before_it() -> None:
    world = World()
    world.pipeline()
    world.submit("r", resumable=True)
    world.say(world.p[0], m.Prefilled(leg_id="r"))
    world.say(world.d[0], step("r", token_ids=[1], num_before=0), [b"x"])
    world.say(world.d[0], step("r", token_ids=[3], finish_reason="stop", num_before=2), [b"z"])
    assert world.take(Finished) == []
    world.sent.clear()
    world.wait(0.5)
    assert [one.output_token_ids for one in world.take(m.Decode)] == [[1]]

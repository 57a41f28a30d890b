"""What the decision core does when something is wrong: lost peers, late messages, overload, cancels."""

from __future__ import annotations

import pytest

from epd import messages as m
from epd.config import BrokerConfig
from epd.messages import Kind, Stage
from tests.broker.world import SLOT_BYTES, Finished, Tokens, World, encode_info, step


@pytest.fixture
def world() -> World:
    world = World()
    world.pipeline()
    return world


def encoding(world: World, request_id: str = "r", patches: list[str] | None = None) -> list:
    world.submit(request_id, patches or ["a", "b"])
    return world.take_jobs()


@pytest.mark.parametrize("stage", ["p", "d"])
def test_a_lost_worker_of_requests_that_may_not_be_tried_again_fails_them_explicitly_in_time(stage: str) -> None:
    world = World(BrokerConfig(max_attempts=1))
    world.pipeline()
    world.submit("r", ["a"])
    [lost] = getattr(world, stage)
    world.wait(4.0, but=(lost,))
    [failed] = world.take(m.Failed, world.endpoint)
    assert (failed.code, failed.status) == ("worker_lost", 502)
    assert f"{stage}0" in failed.message
    other = world.d[0] if stage == "p" else world.p[0]
    assert [one.leg_id for one in world.take(m.Abort, other)] == ["r"]
    world.encode_all()
    world.say(other, m.Released(leg_id="r"))
    world.assert_idle()


def test_a_prefill_worker_lost_after_its_push_harms_nobody(world: World) -> None:
    world.submit("r")
    world.say(world.p[0], m.Prefilled(leg_id="r"))
    world.say(world.p[0], m.Pushed(leg_id="r"))
    world.wait(4.0, but=(world.p[0],))
    assert world.take(m.Failed) == []
    world.say(world.d[0], step("r", token_ids=[7], finish_reason="stop"))
    assert len(world.take(Finished)) == 1
    world.assert_idle()


def test_the_patches_of_a_lost_encode_worker_go_to_another_one_and_to_other_memory(world: World) -> None:
    sends = encoding(world, patches=["a", "b", "c", "d"])
    mine = [send for send in sends if send.peer_id == world.e[0]]
    world.wait(4.0, but=(world.e[0],))
    again = [send for send in world.take_jobs() if send.peer_id == world.e[1]]
    assert [send.message.patch_hash for send in again] == [send.message.patch_hash for send in mine]
    before = {send.message.slot.offset for send in mine}
    assert not before & {send.message.slot.offset for send in again}, "the lost worker might still write there"
    assert again[0].frames == mine[0].frames
    for send in again + [one for one in sends if one.peer_id == world.e[1]]:
        message = send.message
        world.say_encoded(world.e[1], message)
    assert world.core.requests["r"].leg.missing == set()
    assert world.take(m.Failed) == []


def test_without_grace_requests_that_wait_for_an_encode_worker_fail_when_none_is_left() -> None:
    world = World(BrokerConfig(absence_grace_s=0))
    world.pipeline()
    world.submit("r", ["a"])
    world.submit("text")
    world.wait(4.0, but=tuple(world.e))
    assert [(one.request_id, one.code) for one in world.take(m.Failed)] == [("r", "worker_lost")]


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_without_grace_requests_fail_with_the_last_worker_of_a_stage(stage: str) -> None:
    world = World(BrokerConfig(absence_grace_s=0))
    world.pipeline(encode=0)
    for i in range(9):  # the decode worker's batch holds 8
        world.submit(f"r{i}")
    [worker] = world.p if stage == "prefill" else world.d
    world.say(worker, m.Goodbye(reason="killed"))
    assert len(world.take(m.Failed)) == 9
    assert world.core.counters().held_queued == 0


def test_a_patch_that_was_there_when_two_workers_were_lost_fails_its_request_and_spares_the_third() -> None:
    world = World()
    world.pipeline(encode=1)
    world.submit("r", ["poison"])
    world.join("e1", Stage.ENCODE, encode_info())
    world.join("e2", Stage.ENCODE, encode_info())
    for _ in range(2):
        [send] = world.take_jobs()
        world.say(send.peer_id, m.Goodbye(reason="killed"))
    assert world.take_jobs() == []
    [failed] = world.take(m.Failed)
    assert "2 encode workers were lost" in failed.message


def test_the_memory_of_a_lost_encode_worker_is_used_again_once_it_is_back() -> None:
    world = World()
    world.pipeline(pool_bytes=2 * SLOT_BYTES)
    encoding(world, patches=["a"])
    world.wait(4.0, but=(world.e[0],))
    assert world.core.patches.index.stats().quarantined_bytes == SLOT_BYTES
    world.join("e0", Stage.ENCODE, encode_info())
    assert world.core.patches.index.stats().quarantined_bytes == 0


def test_a_late_encoded_of_an_earlier_generation_or_worker_changes_nothing(world: World) -> None:
    first, second = encoding(world)
    message = first.message
    world.say_encoded(second.peer_id, message)
    assert world.take(m.Ready) == []
    assert world.core.counters().num_fenced == 1
    world.say_encoded(first.peer_id, message, message.slot.generation - 1)
    assert world.take(m.Ready) == []


def test_a_stale_slot_is_encoded_again_from_the_request_that_found_it(world: World) -> None:
    [(worker, message)] = (world.submit("r", ["a"]), world.encode_all())[1]
    world.take(m.Ready)
    stale = m.Stale(leg_id="r", patch_hash="a", generation=message.slot.generation, reason="checksum")
    world.say(world.p[0], stale)
    [again] = world.take_jobs()
    assert again.frames == [b"pixels of a"]
    assert again.message.slot.generation > message.slot.generation
    world.say(world.p[0], stale)
    assert world.take_jobs() == [], "a second report of the same generation is late"
    world.say_encoded(again.peer_id, again.message)
    [ready] = world.take(m.Ready, world.p[0])
    assert ready.ready[0].slot == again.message.slot
    assert worker in world.e


def test_a_patch_that_cannot_be_encoded_fails_all_that_wait_for_it_and_nobody_else(world: World) -> None:
    world.submit("r1", ["bad"])
    world.submit("r2", ["bad"])
    world.submit("r3", ["good"])
    for send in world.take_jobs():
        if send.message.patch_hash == "bad":
            world.say(send.peer_id, m.EncodeFailed(job_id=send.message.job_id, message="no such pixels"))
    assert [(one.request_id, one.code) for one in world.take(m.Failed)] == [
        ("r1", "encode_failed"),
        ("r2", "encode_failed"),
    ]
    world.submit("r4", ["bad"])
    assert len(world.take_jobs()) == 1, "the next who asks for it gets a new try"


def test_a_cancelled_request_drops_what_was_not_encoded_and_frees_its_slots_when_nobody_reads_them(
    world: World,
) -> None:
    sends = encoding(world, patches=["a", "b"])
    world.say(world.endpoint, m.Cancel(request_id="r", reason="disconnect"))
    assert {one.leg_id for one in world.take(m.Abort)} == {"r"}
    assert world.core.counters().held_pins == 2, "the prefill worker may still be reading"
    world.say(world.p[0], m.Released(leg_id="r"))
    world.say(world.d[0], m.Released(leg_id="r"))
    drops = world.take_sends(m.DropEncode)
    assert len(drops) == 2
    first, second = sends
    world.say(first.peer_id, m.EncodeFailed(job_id=first.message.job_id, message="dropped", dropped=True))
    world.say_encoded(second.peer_id, second.message)
    world.assert_idle()
    assert world.take(m.Failed) == []
    assert world.take(Finished) == []


def test_a_dropped_patch_that_is_wanted_again_is_encoded_after_all(world: World) -> None:
    [send] = encoding(world, patches=["a"])
    world.say(world.endpoint, m.Cancel(request_id="r"))
    world.say(world.p[0], m.Released(leg_id="r"))
    world.say(world.d[0], m.Released(leg_id="r"))
    world.submit("r2", ["a"])
    world.say(send.peer_id, m.EncodeFailed(job_id=send.message.job_id, message="dropped", dropped=True))
    assert [message.patch_hash for _, message in world.encode_all()] == ["a"]
    assert [one.leg_id for one in world.take(m.Ready)] == ["r2"]


def test_a_lost_endpoint_cancels_its_requests(world: World) -> None:
    world.submit("r")
    world.say(world.endpoint, m.Goodbye(reason="stopped"))
    assert len(world.take(m.Abort)) == 2
    world.say(world.p[0], m.Released(leg_id="r"))
    world.say(world.d[0], m.Released(leg_id="r"))
    world.assert_idle()


def test_without_grace_a_lost_cache_fails_the_requests_whose_patches_it_held_and_a_new_one_serves_the_next() -> None:
    world = World(BrokerConfig(absence_grace_s=0))
    world.pipeline()
    encoding(world, patches=["a"])
    world.wait(4.0, but=(world.cache,))
    assert [one.code for one in world.take(m.Failed)] == ["worker_lost"]
    world.submit("early", ["a"])
    [refused] = world.take(m.Failed)
    assert (refused.code, refused.status) == ("not_ready", 503)
    pool = m.Pool(pool_id="pool2", kind="shared_memory", name="pool2", nbytes=1 << 20, host="h")
    world.join("cache", Kind.CACHE, pools=[pool])
    assert [one.pools for one in world.take(m.Pools, world.p[0])][-1] == [pool]
    world.submit("r2", ["a"])
    assert [message.slot.pool_id for _, message in world.encode_all()] == ["pool2"]


def test_a_worker_that_registers_again_under_its_name_replaces_the_earlier_incarnation(world: World) -> None:
    world.submit("r")
    world.join("d0", Stage.DECODE)
    assert "registered again" in world.core.requests["r"].story[-1].detail
    world.say("d0#1", step("r", token_ids=[7]))
    assert world.take(Tokens) == []
    assert world.take(m.Unknown, "d0#1")


def test_a_message_of_a_peer_that_is_not_registered_is_answered_with_unknown(world: World) -> None:
    world.say("stranger", m.Heartbeat())
    assert len(world.take(m.Unknown, "stranger")) == 1
    assert world.core.counters().num_fenced == 1


def test_a_message_that_the_sender_s_role_may_not_send_changes_nothing(world: World) -> None:
    world.submit("r")
    world.say(world.e[0], step("r", token_ids=[7], finish_reason="stop"))
    world.say(world.endpoint, m.Prefilled(leg_id="r"))
    assert world.core.counters().num_fenced == 2
    assert "r" in world.core.requests


def test_an_accepted_request_ends_exactly_once(world: World) -> None:
    world.submit("r")
    world.finish("r", world.p[0], world.d[0])
    world.finish("r", world.p[0], world.d[0])
    world.say(world.d[0], m.LegFailed(leg_id="r", code="engine_failed", message="late"))
    assert len(world.take(Finished)) == 1
    assert world.take(m.Failed) == []
    world.assert_idle()


def test_a_request_past_its_deadline_fails(world: World) -> None:
    world.submit("r", deadline_s=2.0)
    world.wait(2.5)
    [failed] = world.take(m.Failed)
    assert (failed.code, failed.status) == ("deadline_exceeded", 504)


def test_a_request_that_waits_too_long_for_a_place_is_refused_with_a_time_to_try_again() -> None:
    world = World(BrokerConfig(max_queue_s=1.0))
    world.pipeline(encode=0)
    for i in range(9):
        world.submit(f"r{i}", deadline_s=100)
    world.wait(1.5)
    [failed] = world.take(m.Failed)
    assert (failed.request_id, failed.code, failed.status) == ("r8", "overloaded", 503)
    assert failed.retry_after_s > 0


def test_requests_that_wait_for_a_slot_too_long_are_refused_in_order_while_every_slot_is_pinned() -> None:
    world = World(BrokerConfig(max_queue_s=1.0))
    world.pipeline(pool_bytes=2 * SLOT_BYTES)
    world.submit("holder", ["a", "b"], deadline_s=100)
    world.submit("r1", ["c"], deadline_s=100)
    world.wait(0.5)
    world.submit("r2", ["d"], deadline_s=100)
    world.wait(0.75)
    assert [(one.request_id, one.code) for one in world.take(m.Failed)] == [("r1", "overloaded")]
    world.wait(0.5)
    [failed] = world.take(m.Failed)
    assert (failed.request_id, failed.status) == ("r2", 503)
    assert failed.retry_after_s > 0
    assert world.core.patches.index.stats().used_bytes <= 2 * SLOT_BYTES


def test_requests_beyond_the_queue_s_bound_are_refused_at_once() -> None:
    world = World(BrokerConfig(max_queued=1))
    world.pipeline(encode=0)
    for i in range(10):
        world.submit(f"r{i}")
    assert [(one.request_id, one.status) for one in world.take(m.Failed)] == [("r9", 503)]


def test_requests_beyond_the_bound_on_bytes_are_refused() -> None:
    world = World(BrokerConfig(max_frames_bytes=40))
    world.pipeline()
    world.submit("r1", ["a"])
    world.submit("r2", ["a", "b"])
    assert [one.code for one in world.take(m.Failed)] == ["overloaded"]


@pytest.mark.parametrize(
    ("absent", "word"), [("encode", "no encode"), ("prefill", "no prefill"), ("decode", "no decode")]
)
def test_a_request_is_refused_while_a_stage_has_had_no_worker_for_long(absent: str, word: str) -> None:
    world = World()
    world.pipeline(**{absent: 0})
    world.wait(world.config.absence_grace_s)
    world.submit("r", ["a"])
    [failed] = world.take(m.Failed)
    assert failed.status == 503
    assert word in failed.message


@pytest.mark.parametrize(
    "change", [{"prompt": 5000}, {"patches": [f"h{i}" for i in range(2000)]}, {"patches": ["h"], "tokens": 0}]
)
def test_a_request_that_can_never_fit_is_refused_with_a_reason(world: World, change: dict) -> None:
    world.submit("r", **change)
    [failed] = world.take(m.Failed)
    assert (failed.code, failed.status) == ("too_large", 400)


def test_a_request_that_comes_twice_changes_nothing(world: World) -> None:
    world.submit("r")
    before = world.core.counters().num_fenced
    world.submit("r")
    assert world.take(m.Failed) == []
    assert world.core.counters().num_fenced == before + 1
    assert list(world.core.requests) == ["r"]


def test_a_request_of_another_endpoint_under_the_same_id_is_refused(world: World) -> None:
    world.submit("r")
    world.endpoint = world.join("ep2", Kind.ENDPOINT)
    world.submit("r")
    assert [one.code for one in world.take(m.Failed, world.endpoint)] == ["duplicate_request"]
    assert "r" in world.core.requests


def test_a_preempted_request_whose_patches_are_gone_fails_explicitly(world: World) -> None:
    world.submit("r", ["a"])
    world.encode_all()
    world.say(world.p[0], m.Prefilled(leg_id="r"))
    world.say(world.d[0], step("r", token_ids=[7]), [b"t"])
    world.say(world.cache, m.Goodbye())
    world.say(world.d[0], m.NeedPatches(leg_id="r", patch_hashes=["a"]))
    assert [one.code for one in world.take(m.Failed)] == ["preempted"]

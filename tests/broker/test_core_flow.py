"""A request's way through the decision core, when all goes well."""

from __future__ import annotations

import pytest

from epd import messages as m
from epd.config import BrokerConfig
from epd.messages import Kind
from tests.broker.world import SLOT_BYTES, Finished, Tokens, World, step


@pytest.fixture
def world() -> World:
    world = World()
    world.pipeline()
    return world


def test_prefill_and_decode_get_their_parts_at_once_while_patches_are_being_encoded(world: World) -> None:
    world.submit("r", ["a", "b", "c"])
    [prefill] = world.take_sends(m.Prefill)
    [decode] = world.take_sends(m.Decode)
    assert (prefill.peer_id, prefill.frames, prefill.message.ready) == (world.p[0], [b"engine"], [])
    assert (decode.peer_id, decode.frames) == (world.d[0], [b"engine"])
    assert decode.message.prefill.engine_id == "engine-p0"
    assert len(world.take_jobs()) == 3


def test_the_patches_of_one_request_go_to_all_encode_workers(world: World) -> None:
    world.submit("r", [f"h{i}" for i in range(7)])
    sends = world.take_jobs()
    assert sorted(send.peer_id for send in sends) == sorted([world.e[0]] * 4 + [world.e[1]] * 3)
    assert {send.message.patch_hash: send.frames for send in sends}["h3"] == [b"pixels of h3"]
    offsets = {send.message.slot.offset for send in sends}
    assert len(offsets) == 7, "every patch has a slot of its own"


def test_the_prefill_worker_hears_of_each_patch_as_it_is_done(world: World) -> None:
    world.submit("r", ["a", "b"])
    first, second = world.take_jobs()
    world.say_encoded(first.peer_id, first.message)
    [ready] = world.take(m.Ready, world.p[0])
    assert [one.patch_hash for one in ready.ready] == ["a"]
    assert ready.ready[0].slot == first.message.slot
    assert second.message.patch_hash == "b"


def test_tokens_and_the_end_reach_the_endpoint_with_their_frames_and_the_story(world: World) -> None:
    world.submit("r", ["a"])
    world.encode_all()
    world.finish("r", world.p[0], world.d[0])
    [tokens] = world.take_sends(Tokens)
    [finished] = world.take_sends(Finished)
    assert (tokens.peer_id, tokens.frames) == (world.endpoint, [b"t1"])
    assert (finished.peer_id, finished.frames) == (world.endpoint, [b"t2"])
    events = [line.event for line in finished.message.story]
    expected = ["accepted", "started", "encode", "encoded", "prefilled", "pushed", "first token", "finished"]
    assert events == expected
    assert {line.worker for line in finished.message.story if line.event == "encoded"} == {"e0"}
    world.assert_idle()


def test_the_decode_worker_is_woken_when_its_kv_is_on_its_way(world: World) -> None:
    world.submit("r")
    world.say(world.p[0], m.Prefilled(leg_id="r"))
    assert [one.leg_id for one in world.take(m.Prefilled, world.d[0])] == ["r"]


def test_a_text_only_request_needs_no_encode_worker() -> None:
    world = World()
    world.pipeline(encode=0)
    world.submit("r")
    world.finish("r", world.p[0], world.d[0])
    assert world.take(Finished, world.endpoint)
    world.assert_idle()


def test_a_patch_that_is_in_the_cache_is_not_encoded_again(world: World) -> None:
    world.submit("r1", ["a", "b"])
    assert len(world.encode_all()) == 2
    world.finish("r1", world.p[0], world.d[0])
    world.sent.clear()
    world.submit("r2", ["a", "b"])
    assert world.encode_all() == []
    [prefill] = world.take(m.Prefill)
    assert [one.patch_hash for one in prefill.ready] == ["a", "b"]


def test_a_patch_wanted_by_two_requests_at_once_is_encoded_once_and_both_hear_of_it(world: World) -> None:
    world.submit("r1", ["a"])
    world.submit("r2", ["a"])
    assert len(world.encode_all()) == 1
    assert [one.leg_id for one in world.take(m.Ready)] == ["r1", "r2"]
    assert world.core.counters().num_coalesced == 1


def test_a_patch_repeated_in_one_request_is_encoded_once(world: World) -> None:
    world.submit("r", ["blank", "x", "blank"])
    assert sorted(message.patch_hash for _, message in world.encode_all()) == ["blank", "x"]


def test_requests_go_to_the_least_loaded_workers() -> None:
    world = World()
    world.pipeline(prefill=2, decode=2)
    world.submit("long", prompt=1000)
    world.submit("short", prompt=10)
    world.submit("next", prompt=10)
    assert [send.peer_id for send in world.take_sends(m.Prefill)] == [world.p[0], world.p[1], world.p[1]]
    assert [send.peer_id for send in world.take_sends(m.Decode)] == [world.d[0], world.d[1], world.d[1]]


def test_requests_wait_in_order_while_the_decode_workers_are_full() -> None:
    world = World()
    world.pipeline(encode=0)
    for i in range(10):  # the decode worker's batch holds 8
        world.submit(f"r{i}")
    assert len(world.take(m.Prefill)) == 8
    assert world.core.counters().held_queued == 2
    world.finish("r3", world.p[0], world.d[0])
    assert [one.leg_id for one in world.take(m.Prefill)] == ["r8"]


def test_requests_wait_while_every_slot_is_pinned_and_start_in_order_when_some_are_released() -> None:
    world = World()
    world.pipeline(pool_bytes=4 * SLOT_BYTES)
    world.submit("r1", ["a", "b", "c"])
    world.submit("r2", ["d", "e"])
    world.submit("r3", ["f"])
    assert [one.leg_id for one in world.take(m.Prefill)] == ["r1"]
    world.encode_all()
    world.say(world.p[0], m.Prefilled(leg_id="r1"))
    assert [one.leg_id for one in world.take(m.Prefill)] == ["r2", "r3"]


def test_tokens_that_overtake_prefilled_are_delivered_and_the_end_waits_for_it(world: World) -> None:
    world.submit("r", ["a"])
    world.encode_all()
    world.say(world.d[0], step("r", token_ids=[7]), [b"t1"])
    world.say(world.d[0], step("r", token_ids=[7], finish_reason="length"), [b"t2"])
    assert len(world.take(Tokens)) == 1
    assert world.take(Finished) == [], "prompt log-probabilities may still come"
    world.say(world.p[0], m.Prefilled(leg_id="r"), [b"logprobs"])
    kinds = [type(send.message) for send in world.sent if send.peer_id == world.endpoint]
    assert kinds == [Tokens, Finished]
    world.assert_idle()


def test_the_endpoint_is_told_how_much_of_the_prompt_the_prefill_worker_had_computed_before(world: World) -> None:
    for request_id in ("early", "late"):
        world.submit(request_id)
    world.say(world.d[0], step("early", token_ids=[7]), [b"t1"])
    for request_id in ("early", "late"):
        world.say(world.p[0], m.Prefilled(leg_id=request_id, num_cached_tokens=16))
    world.say(world.d[0], step("late", token_ids=[7]), [b"t1"])
    assert [one.num_cached_tokens for one in world.take(Tokens)] == [-1, 16]
    world.say(world.d[0], step("late", token_ids=[8], finish_reason="stop"), [b"t2"])
    assert [one.num_cached_tokens for one in world.take(Finished)] == [16]


def test_an_answer_that_is_complete_survives_the_loss_of_its_prefill_worker(world: World) -> None:
    world.submit("r")
    world.say(world.d[0], step("r", token_ids=[7], finish_reason="length"), [b"t"])
    world.say(world.p[0], m.Goodbye(reason="killed"))
    assert len(world.take(Finished, world.endpoint)) == 1
    world.assert_idle()


def test_prompt_log_probabilities_of_the_prefill_worker_are_passed_on_as_tokens(world: World) -> None:
    world.submit("r")
    world.say(world.p[0], m.Prefilled(leg_id="r"), [b"logprobs"])
    [send] = world.take_sends(Tokens)
    assert (send.peer_id, send.message.token_ids, send.frames) == (world.endpoint, [], [b"logprobs"])


def test_an_encode_worker_is_not_given_more_than_a_few_batches_ahead() -> None:
    world = World(BrokerConfig(encode_batches_ahead=1))
    world.pipeline(encode=1)
    world.submit("r", [f"h{i}" for i in range(40)], prompt=200)  # 160 tokens, batches of 64
    first = world.take_jobs()
    assert len(first) == 16
    one = first[0].message
    world.say_encoded(world.e[0], one)
    assert len(world.take_jobs()) == 1


def test_a_story_can_be_asked_for_while_the_request_runs_and_after_it(world: World) -> None:
    world.submit("r")
    world.say(world.endpoint, m.GetStory(request_id="r"))
    [story] = world.take(m.Story)
    assert (story.found, story.state) == (True, "prefilling")
    world.finish("r", world.p[0], world.d[0])
    world.say(world.endpoint, m.GetStory(request_id="r"))
    world.say(world.endpoint, m.GetStory(request_id="never"))
    after, never = world.take(m.Story)
    assert (after.found, after.state) == (True, "finished")
    assert not never.found


def test_a_preempted_request_gets_its_patches_again_on_the_decode_worker(world: World) -> None:
    world.submit("r", ["a", "b"])
    world.encode_all()
    world.say(world.p[0], m.Prefilled(leg_id="r"))
    world.say(world.d[0], step("r", token_ids=[7]), [b"t1"])
    world.say(world.d[0], m.NeedPatches(leg_id="r", patch_hashes=["a", "b"]))
    ready = world.take(m.Ready, world.d[0])
    assert [one.patch_hash for one in ready[-1].ready] == ["a", "b"]
    world.say(world.d[0], step("r", token_ids=[7], finish_reason="stop"), [b"t2"])
    world.assert_idle()


def test_new_patches_go_to_the_pool_on_the_host_of_the_prefill_worker(world: World) -> None:
    far = m.Pool(pool_id="far", kind="shared_memory", name="far", nbytes=1 << 20, host="elsewhere")
    hello = m.Hello(name="cache-2", kind=Kind.CACHE, incarnation="c2", host="elsewhere", pid=1, pools=[far])
    world.say("c2", hello)
    world.submit("r", ["a", "b"])
    assert {send.message.slot.pool_id for send in world.take_jobs()} == {"pool"}

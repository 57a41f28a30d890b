"""Requests that lose a worker and go on elsewhere: nothing is computed twice without need, and no token is lost."""

from __future__ import annotations

import pytest

from epd import messages as m
from epd.config import BrokerConfig
from epd.messages import Kind, Stage
from tests.broker.world import SLOT_BYTES, Finished, Tokens, World, decode_info, encode_info, prefill_info, step


@pytest.fixture
def world() -> World:
    world = World()
    world.pipeline(prefill=2, decode=2)
    return world


def lose(world: World, peer_id: str) -> None:
    """A worker dies, and the time passes after which its requests are tried again."""
    world.say(peer_id, m.Goodbye(reason="the engine failed"))
    world.wait(0.5)


def legs(world: World) -> tuple[str, str, str]:
    """The leg that was started last: its id, its prefill and its decode worker."""
    [prefill], [decode] = world.take_sends(m.Prefill), world.take_sends(m.Decode)
    assert prefill.message.leg_id == decode.message.leg_id
    assert prefill.message.output_token_ids == decode.message.output_token_ids
    assert prefill.frames == decode.frames == [b"engine"]
    return prefill.message.leg_id, prefill.peer_id, decode.peer_id


def release(world: World, leg_id: str) -> None:
    """All that were told to abort a leg answer."""
    for send in world.take_sends(m.Abort):
        assert send.message.leg_id == leg_id
        world.say(send.peer_id, m.Released(leg_id=leg_id))


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_a_request_that_loses_a_worker_before_its_first_token_starts_again_elsewhere(world: World, stage: str) -> None:
    world.submit("r", ["a"])
    first, prefill, decode = legs(world)
    assert first == "r"
    world.encode_all()
    world.take(m.Ready)
    lost = prefill if stage == "prefill" else decode
    lose(world, lost)
    second, *workers = legs(world)
    assert second != "r"
    assert lost not in workers
    release(world, "r")
    world.finish(second, *workers)
    [tokens] = world.take(Tokens, world.endpoint)
    [finished] = world.take(Finished, world.endpoint)
    assert (tokens.request_id, finished.request_id) == ("r", "r")
    assert world.take_jobs() == [], "its patch was in the cache"
    events = [line.event for line in finished.story]
    assert events.count("retried") == 1
    assert "was lost" in next(line.detail for line in finished.story if line.event == "retried")
    world.assert_idle()


def test_patches_that_are_being_encoded_when_the_prefill_worker_is_lost_are_not_encoded_twice(world: World) -> None:
    world.submit("r", ["a", "b"])
    _, prefill, _ = legs(world)
    jobs = world.take_jobs()
    world.say(prefill, m.Goodbye(reason="the engine failed"))
    release(world, "r")
    world.say_encoded(jobs[0].peer_id, jobs[0].message)
    assert world.take(m.Ready) == []
    world.wait(0.5)
    assert world.take(m.DropEncode) == []
    [again] = world.take_sends(m.Prefill)
    assert [one.patch_hash for one in again.message.ready] == ["a"]
    world.say_encoded(jobs[1].peer_id, jobs[1].message)
    [ready] = world.take_sends(m.Ready)
    assert (ready.peer_id, ready.message.leg_id) == (again.peer_id, again.message.leg_id)
    assert world.take_jobs() == []


def test_a_stream_whose_decode_worker_is_lost_goes_on_after_its_last_token(world: World) -> None:
    world.submit("r", ["a"], resumable=True)
    first, prefill, decode = legs(world)
    world.encode_all()
    world.say(prefill, m.Prefilled(leg_id=first))
    world.say(prefill, m.Pushed(leg_id=first))
    world.say(decode, step(first, token_ids=[1, 2]), [b"x"])
    world.say(decode, step(first, token_ids=[3]), [b"y"])
    lose(world, decode)
    [sent] = [send.message for send in world.sent if isinstance(send.message, m.Decode) and send.peer_id != decode]
    assert sent.output_token_ids == [1, 2, 3]
    peer = world.core.registry.get(next(one for one in world.d if one != decode))
    assert peer.kv_tokens_reserved == 32 + 16, "prompt, tokens so far and tokens to come are as much as before"
    world.say(decode, step(first, token_ids=[4]), [b"late"])
    world.sent.clear()
    world.finish(sent.leg_id, prefill, peer.peer_id)
    assert [one.request_id for one in world.take(Tokens, world.endpoint)] == ["r"]
    [finished] = world.take(Finished)
    assert "5 tokens" in finished.story[-1].detail
    world.assert_idle()


def test_a_stream_that_cannot_be_continued_exactly_fails_with_its_worker(world: World) -> None:
    world.submit("r")
    _, prefill, decode = legs(world)
    world.say(prefill, m.Prefilled(leg_id="r"))
    world.say(decode, step("r", token_ids=[1]), [b"x"])
    lose(world, decode)
    [failed] = world.take(m.Failed)
    assert (failed.request_id, failed.code) == ("r", "worker_lost")
    assert "cannot be continued" in failed.message
    assert world.take(m.Prefill) == []


def test_a_worker_that_says_that_a_request_fails_is_believed(world: World) -> None:
    world.submit("r")
    leg, prefill, _ = legs(world)
    world.say(prefill, m.LegFailed(leg_id=leg, code="engine_failed", message="no such token"))
    [failed] = world.take(m.Failed, world.endpoint)
    assert (failed.request_id, failed.code) == ("r", "engine_failed")
    world.wait(1)
    assert world.take(m.Prefill) == []


def test_a_request_that_loses_worker_after_worker_fails_after_so_many_attempts() -> None:
    world = World(BrokerConfig(max_attempts=3))
    world.pipeline()
    world.submit("r")
    ids = []
    for _ in range(3):
        leg, prefill, _ = legs(world)
        ids.append(leg)
        world.say(prefill, m.Goodbye(reason="the engine failed"))
        world.join("p0", Stage.PREFILL, prefill_info("p0"))
        world.wait(2)
    assert len(set(ids)) == 3
    [failed] = world.take(m.Failed)
    assert (failed.code, failed.status) == ("worker_lost", 502)
    assert "tried 3 times" in failed.message


def test_the_attempts_that_the_endpoint_has_counted_count(world: World) -> None:
    world.submit("r", attempts=2, output_token_ids=[1, 2], resumable=True)
    leg, prefill, _ = legs(world)
    assert leg != "r", "an earlier broker may have given it to the same workers"
    lose(world, prefill)
    assert [one.code for one in world.take(m.Failed)] == ["worker_lost"]


def test_a_worker_that_leaves_in_good_order_costs_no_attempt() -> None:
    world = World(BrokerConfig(max_attempts=1))
    world.pipeline(prefill=1, decode=2)
    world.submit("r")
    _, _, decode = legs(world)
    world.say(decode, m.Draining())
    world.say(decode, m.Goodbye(reason="stopped"))
    world.wait(0.5)
    second, _, other = legs(world)
    assert second != "r"
    assert other != decode


def test_the_slots_of_an_earlier_leg_stay_pinned_while_a_worker_may_read_them() -> None:
    world = World()
    world.pipeline(prefill=2, decode=2)
    world.submit("r", ["a"])
    first, prefill, decode = legs(world)
    world.encode_all()
    lose(world, decode)
    second, *workers = legs(world)
    assert world.holders("a") == [first, second]
    world.finish(second, *workers)
    assert world.holders("a") == [first], "the first prefill worker may be reading still"
    world.say(prefill, m.Prefilled(leg_id=first))
    assert world.holders("a") == []
    release(world, first)
    world.assert_idle()


def test_what_an_earlier_leg_still_says_is_fenced(world: World) -> None:
    world.submit("r", ["a"], resumable=True)
    first, prefill, decode = legs(world)
    world.encode_all()
    lose(world, prefill)
    before = world.core.counters().num_fenced
    world.sent.clear()
    world.say(decode, step(first, token_ids=[9]), [b"x"])
    world.say(decode, m.NeedPatches(leg_id=first, patch_hashes=["a"]))
    assert world.core.counters().num_fenced == before + 2
    world.say(decode, step(first, token_ids=[9], finish_reason="stop"), [b"x"])
    assert world.sent == []
    assert world.core.requests["r"].output_token_ids == []


def test_prompt_log_probabilities_reach_the_endpoint_once_over_all_attempts(world: World) -> None:
    world.submit("r", resumable=True)
    first, prefill, decode = legs(world)
    world.say(prefill, m.Prefilled(leg_id=first), [b"logprobs"])
    world.say(decode, step(first, token_ids=[1]), [b"x"])
    lose(world, decode)
    second, prefill, decode = legs(world)
    world.say(prefill, m.Prefilled(leg_id=second), [b"logprobs"])
    world.say(decode, step(second, token_ids=[2], finish_reason="stop"), [b"y"])
    told = [send.frames for send in world.sent if send.peer_id == world.endpoint and send.frames]
    assert told == [[b"logprobs"], [b"x"], [b"y"]]


def test_a_prefill_worker_lost_between_prompt_and_push_of_an_answer_that_has_begun_harms_nobody(world: World) -> None:
    world.submit("r")
    first, prefill, decode = legs(world)
    world.say(prefill, m.Prefilled(leg_id=first))
    world.say(decode, step(first, token_ids=[1]), [b"x"])
    lose(world, prefill)
    world.say(decode, step(first, token_ids=[2], finish_reason="stop"), [b"y"])
    assert len(world.take(Finished)) == 1
    world.assert_idle()


def test_prompt_log_probabilities_that_a_lost_prefill_worker_did_not_send_are_computed_again(world: World) -> None:
    world.submit("r", ["a"], resumable=True)
    first, prefill, decode = legs(world)
    world.encode_all()
    world.say(decode, step(first, token_ids=[1]), [b"x"])
    lose(world, prefill)
    [again] = world.take(m.Prefill)
    assert again.output_token_ids == [1]


def test_a_finished_answer_that_waits_for_prefilled_survives_the_loss_of_its_decode_worker(world: World) -> None:
    world.submit("r")
    first, prefill, decode = legs(world)
    world.say(decode, step(first, token_ids=[1], finish_reason="stop"), [b"x"])
    lose(world, decode)
    assert world.take(Finished) == []
    world.say(prefill, m.Prefilled(leg_id=first), [b"logprobs"])
    assert len(world.take(Finished)) == 1
    world.assert_idle()


def test_patches_that_have_left_the_cache_are_asked_for_again(world: World) -> None:
    world = World(BrokerConfig(pixel_store_bytes=0))
    world.pipeline(decode=2)
    world.submit("r", ["a"], resumable=True)
    first, prefill, decode = legs(world)
    world.encode_all()
    world.say(prefill, m.Prefilled(leg_id=first))
    world.say(world.cache, m.Goodbye())
    pool = m.Pool(pool_id="pool2", kind="shared_memory", name="pool2", nbytes=1 << 20, host="h")
    world.join("cache", Kind.CACHE, pools=[pool])
    world.say(decode, step(first, token_ids=[1]), [b"x"])
    lose(world, decode)
    [failed] = world.take(m.Failed)
    assert failed.code == "pixels_needed"
    world.submit("r", ["a"], resumable=True, attempts=1, output_token_ids=[1])
    [again] = world.take(m.Prefill)
    assert again.leg_id not in ("r", first)
    assert again.output_token_ids == [1]


def test_a_request_whose_cache_is_lost_waits_for_another_one_and_is_encoded_there(world: World) -> None:
    world.submit("r", ["a"])
    legs(world)
    world.take_jobs()
    world.say(world.cache, m.Goodbye())
    release(world, "r")
    world.wait(3)
    assert world.take(m.Failed) == []
    pool = m.Pool(pool_id="pool2", kind="shared_memory", name="pool2", nbytes=1 << 20, host="h")
    world.join("cache", Kind.CACHE, pools=[pool])
    second, *workers = legs(world)
    [(_, job)] = world.encode_all()
    assert job.slot.pool_id == "pool2"
    world.finish(second, *workers)
    assert len(world.take(Finished)) == 1


def test_a_request_that_is_tried_again_comes_before_all_that_have_not_been_started(world: World) -> None:
    world = World()
    world.pipeline(encode=0, decode=2)
    for i in range(18):  # two batches of 8
        world.submit(f"r{i}")
    world.sent.clear()
    lose(world, world.d[0])
    retried = sorted(one for one, request in world.core.requests.items() if request.num_losses)
    assert len(retried) == 8
    for i in range(18):
        request = world.core.requests.get(f"r{i}")
        if request and request.leg.decode and request.leg.decode.peer_id == world.d[1]:
            world.finish(request.leg.leg_id, world.p[0], world.d[1])
    started = [one.leg_id.partition("~")[0] for one in world.take(m.Prefill)]
    assert sorted(started[:8]) == retried


def test_a_cancel_ends_a_request_between_two_legs(world: World) -> None:
    world.submit("r", ["a"])
    _, prefill, _ = legs(world)
    jobs = world.take_jobs()
    world.say(prefill, m.Goodbye(reason="the engine failed"))
    release(world, "r")
    world.say(world.endpoint, m.Cancel(request_id="r"))
    [drop] = world.take_sends(m.DropEncode)
    world.say(drop.peer_id, m.EncodeFailed(job_id=jobs[0].message.job_id, message="dropped", dropped=True))
    world.wait(1)
    assert world.take(m.Prefill) == []
    world.assert_idle()


def test_an_endpoint_that_comes_back_submits_its_requests_again(world: World) -> None:
    world.submit("r", resumable=True)
    first, *_ = legs(world)
    world.endpoint = world.join("ep", Kind.ENDPOINT)
    world.submit("r", resumable=True, attempts=1, output_token_ids=[1])
    assert world.take(m.Failed) == []
    second, *workers = legs(world)
    assert second != first
    release(world, first)
    world.finish(second, *workers)
    [finished] = world.take_sends(Finished)
    assert (finished.peer_id, finished.message.request_id) == (world.endpoint, "r")
    world.assert_idle()


def test_patches_whose_encode_worker_is_lost_while_the_cache_is_full_wait_for_room(world: World) -> None:
    world = World()
    world.pipeline(pool_bytes=SLOT_BYTES)
    world.submit("r", ["a"])
    [job] = world.take_jobs()
    world.say(job.peer_id, m.Goodbye(reason="the engine failed"))
    release(world, "r")
    assert world.take(m.Failed) == []
    world.join(job.peer_id.partition("#")[0], Stage.ENCODE, encode_info())
    world.wait(0.5)
    assert len(world.take_jobs()) == 1


def test_requests_that_kept_their_slots_are_started_before_those_that_need_new_ones() -> None:
    world = World()
    world.pipeline(decode=2, pool_bytes=2 * SLOT_BYTES)
    world.submit("r1", ["a", "b"], resumable=True)
    world.encode_all()
    request = world.core.requests["r1"]
    world.say(request.leg.prefill.peer_id, m.Prefilled(leg_id="r1"))
    world.say(request.leg.decode.peer_id, step("r1", token_ids=[1]), [b"x"])
    world.submit("r2", ["c", "d"], prompt=3000)  # it takes the slots of the first, and the other decode worker
    world.encode_all()
    world.core.patches.pixels.put({"a": [b"a"], "b": [b"b"]})
    world.sent.clear()
    for name in ("d0", "d1"):
        world.say(f"{name}#1", m.Goodbye(reason="the engine failed"))
    for send in world.take_sends(m.Abort):
        world.say(send.peer_id, m.Released(leg_id=send.message.leg_id))
    world.join("d0", Stage.DECODE, decode_info(kv_capacity_tokens=8192))
    world.wait(1)
    [second] = world.take(m.Prefill)
    assert second.leg_id.startswith("r2~"), "the first one needs slots that the second one holds"
    world.say(world.p[0], m.Prefilled(leg_id=second.leg_id))
    [first] = world.take(m.Prefill)
    assert first.leg_id.startswith("r1~")

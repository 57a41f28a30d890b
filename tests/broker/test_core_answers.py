"""The first token of an answer comes from the prefill worker, where the endpoint has asked for that."""

from __future__ import annotations

import pytest

from epd import messages as m
from tests.broker.world import Finished, Tokens, World, step


@pytest.fixture
def world() -> World:
    world = World()
    world.pipeline(prefill=2, decode=2)
    return world


def start(world: World, **more: object) -> tuple[m.Prefill, m.Decode]:
    """Submits a text whose first token prefill samples; returns what its workers were told."""
    world.submit("r", **{"resumable": True, "prefill_samples": True, **more})
    return world.take(m.Prefill)[0], world.take(m.Decode)[0]


def workers(world: World) -> tuple[str, str]:
    request = world.core.requests["r"]
    prefill, decode = request.leg.prefill, request.leg.decode
    return prefill.peer_id, decode.peer_id if decode else ""


def events(world: World) -> list[str]:
    return [event.event for event in world.core.stories.story("r").events]


def test_workers_are_told_which_of_them_samples_the_first_token(world: World) -> None:
    prefill, decode = start(world)
    assert prefill.samples
    assert decode.awaits_token
    world.submit("other")
    assert not world.take(m.Prefill)[0].samples
    assert not world.take(m.Decode)[0].awaits_token


def test_the_first_token_goes_to_the_client_and_to_the_decode_worker_at_once(world: World) -> None:
    start(world)
    p, d = workers(world)
    world.say(p, m.Prefilled(leg_id="r", num_cached_tokens=16, token_ids=[5]), [b"t0"])
    [told] = world.take_sends(Tokens)
    assert (told.peer_id, told.frames) == (world.endpoint, [b"t0"])
    assert told.message == Tokens(request_id="r", token_ids=[5], num_before=0, num_cached_tokens=16, num_frames=1)
    assert [one.token_ids for one in world.take(m.Prefilled, d)] == [[5]]
    world.say(p, m.Pushed(leg_id="r"))
    world.say(d, step("r", token_ids=[6], num_before=1, num_pushed_tokens=16), [b"t1"])
    world.say(d, step("r", token_ids=[7], finish_reason="stop", num_before=2), [b"t2"])
    assert [one.token_ids for one in world.take(Tokens)] == [[6]]
    assert [one.token_ids for one in world.take(Finished)] == [[7]]
    expected = ["accepted", "started", "prefilled", "first token", "pushed", "decoding", "finished"]
    assert events(world) == expected
    details = {event.event: (event.worker, event.detail) for event in world.core.stories.story("r").events}
    assert details["first token"][0].startswith("p")
    assert details["decoding"][0].startswith("d")
    assert details["decoding"][1] == "KV of 16 of 32 tokens was pushed"
    assert details["finished"][1] == "3 tokens, stop"
    world.assert_idle()


def test_a_request_that_ends_with_its_first_token_lets_go_of_its_decode_worker(world: World) -> None:
    start(world)
    p, d = workers(world)
    reason = "stop"
    world.say(p, m.Prefilled(leg_id="r", token_ids=[5], finish_reason=reason), [b"t0"])
    [done] = world.take_sends(Finished)
    assert (done.peer_id, done.frames, done.message.finish_reason) == (world.endpoint, [b"t0"], reason)
    assert (done.message.token_ids, done.message.num_before) == ([5], 0)
    assert not world.take(m.Prefilled), "decode has nothing to go on with"
    assert {send.peer_id for send in world.take_sends(m.Abort)} == {p, d}, "neither waits for the push of its KV"
    for peer_id in (p, d):
        world.say(peer_id, m.Released(leg_id="r"))
    world.assert_idle()


def test_a_request_for_one_token_needs_no_decode_worker(world: World) -> None:
    world.submit("r", resumable=True, prefill_samples=True, max_tokens=1)
    [prefill] = world.take(m.Prefill)
    assert prefill.is_last
    assert not world.take(m.Decode)
    p, d = workers(world)
    assert d == ""
    assert all(not peer.kv_tokens_reserved for peer in world.core.registry.serving(m.Stage.DECODE))
    world.say(p, m.Prefilled(leg_id="r", token_ids=[5], finish_reason="length"), [b"t0"])
    [done] = world.take(Finished)
    assert (done.token_ids, done.finish_reason) == ([5], "length")
    assert not world.take(m.Abort), "nothing is kept for anybody"
    world.assert_idle()


def test_the_last_token_of_an_answer_that_goes_on_elsewhere_needs_no_decode_worker(world: World) -> None:
    start(world, max_tokens=2)
    p, d = workers(world)
    world.say(p, m.Prefilled(leg_id="r", token_ids=[5]), [b"t0"])
    world.say(d, m.Goodbye(reason="killed"))
    world.wait(1.0)
    [prefill] = world.take(m.Prefill)
    assert (prefill.output_token_ids, prefill.is_last) == ([5], True)
    assert not world.take(m.Decode)


def test_requests_for_one_token_wait_their_turn_where_prefill_has_enough(world: World) -> None:
    for number in range(40):
        world.submit(f"r{number}", resumable=True, prefill_samples=True, max_tokens=1)
    told = [send.peer_id for send in world.take_sends(m.Prefill)]
    assert sorted({peer_id: told.count(peer_id) for peer_id in told}.values()) == [8, 8], "the sequences of a batch"
    request = world.core.requests["r0"]
    world.say(request.leg.prefill.peer_id, m.Prefilled(leg_id="r0", token_ids=[5], finish_reason="length"))
    assert [one.leg_id for one in world.take(m.Prefill)] == ["r16"]


def test_a_request_that_decode_samples_needs_a_decode_worker_even_for_one_token(world: World) -> None:
    world.submit("r", resumable=False, max_tokens=1)
    assert not world.take(m.Prefill)[0].is_last
    assert world.take(m.Decode)


@pytest.mark.parametrize("stage", ["prefill", "decode"])
def test_a_worker_that_is_lost_after_the_first_token_costs_no_token(world: World, stage: str) -> None:
    start(world)
    p, d = workers(world)
    world.say(p, m.Prefilled(leg_id="r", token_ids=[5]), [b"t0"])
    world.say(p if stage == "prefill" else d, m.Goodbye(reason="the engine failed"))
    world.wait(1.0)
    [prefill], [decode] = world.take(m.Prefill), world.take(m.Decode)
    assert prefill.output_token_ids == decode.output_token_ids == [5]
    assert prefill.samples and decode.awaits_token
    assert prefill.leg_id == decode.leg_id != "r"
    p, d = workers(world)
    world.take(Tokens)
    world.say(p, m.Prefilled(leg_id=prefill.leg_id, token_ids=[6]), [b"t1"])
    [told] = world.take(Tokens)
    assert (told.token_ids, told.num_before) == ([6], 1)
    world.say(p, m.Pushed(leg_id=prefill.leg_id))
    world.say(d, step(prefill.leg_id, token_ids=[7], finish_reason="stop", num_before=2), [b"t2"])
    assert [one.token_ids for one in world.take(Finished)] == [[7]]


def test_a_prefill_worker_that_is_lost_after_the_push_is_not_missed(world: World) -> None:
    start(world)
    p, d = workers(world)
    world.say(p, m.Prefilled(leg_id="r", token_ids=[5]), [b"t0"])
    world.say(p, m.Pushed(leg_id="r"))
    world.say(p, m.Goodbye(reason="the engine failed"))
    world.say(d, step("r", token_ids=[6], finish_reason="stop", num_before=1), [b"t1"])
    assert [one.token_ids for one in world.take(Finished)] == [[6]]
    assert "retried" not in events(world)


def test_a_client_that_leaves_after_the_first_token_leaves_nothing(world: World) -> None:
    start(world)
    p, d = workers(world)
    world.say(p, m.Prefilled(leg_id="r", token_ids=[5]), [b"t0"])
    world.say(world.endpoint, m.Cancel(request_id="r", reason="stop"))
    assert {send.peer_id for send in world.take_sends(m.Abort)} == {p, d}
    for peer_id in (p, d):
        world.say(peer_id, m.Released(leg_id="r"))
    world.assert_idle()

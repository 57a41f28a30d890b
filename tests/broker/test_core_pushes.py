"""KV between prefill and decode: who is told when it is not wanted any more, and what a refusal leads to."""

from __future__ import annotations

import pytest

from broker.core.legs import REMIND_EVERY_S
from epd import messages as m
from tests.broker.world import World, step


@pytest.fixture
def world() -> World:
    """A request whose prompt is computed, and whose KV has not arrived."""
    world = World()
    world.pipeline(prefill=2, decode=2)
    world.submit("r")
    [prefill], [decode] = world.take_sends(m.Prefill), world.take_sends(m.Decode)
    world.prefill, world.decode = prefill.peer_id, decode.peer_id  # type: ignore[attr-defined]
    world.say(prefill.peer_id, m.Prefilled(leg_id="r"))
    world.sent.clear()
    return world


def test_kv_whose_decode_worker_is_lost_is_released_at_once(world: World) -> None:
    world.say(world.decode, m.Goodbye())
    assert [send.peer_id for send in world.take_sends(m.Abort)] == [world.prefill]


def test_kv_of_a_cancelled_request_is_released_on_both_sides(world: World) -> None:
    world.say(world.endpoint, m.Cancel(request_id="r"))
    sends = world.take_sends(m.Abort)
    assert {send.peer_id for send in sends} == {world.prefill, world.decode}
    for send in sends:
        world.say(send.peer_id, m.Released(leg_id="r"))
    world.assert_idle()


def test_a_prefill_worker_is_not_bothered_once_the_kv_has_arrived(world: World) -> None:
    world.say(world.decode, step("r", token_ids=[7], num_before=0), [b"t"])
    world.say(world.endpoint, m.Cancel(request_id="r"))
    assert [send.peer_id for send in world.take_sends(m.Abort)] == [world.decode]


def test_a_request_whose_kv_is_refused_is_tried_again(world: World) -> None:
    world.say(world.decode, m.LegFailed(leg_id="r", code="worker_lost", message="its KV was not pushed"))
    assert world.take(m.Failed) == []
    [abort] = world.take_sends(m.Abort)
    assert abort.peer_id == world.prefill
    world.wait(0.5)
    [again] = world.take(m.Prefill)
    assert again.leg_id != "r"


def test_a_worker_that_does_not_answer_an_abort_is_asked_again(world: World) -> None:
    world.say(world.endpoint, m.Cancel(request_id="r"))
    [one] = [send.peer_id for send in world.take_sends(m.Abort) if send.peer_id != world.decode]
    world.say(one, m.Released(leg_id="r"))
    world.wait(REMIND_EVERY_S + 1.0)
    assert {send.peer_id for send in world.take_sends(m.Abort)} == {world.decode}
    world.say(world.decode, m.Released(leg_id="r"))
    world.wait(REMIND_EVERY_S + 1.0)
    assert world.take_sends(m.Abort) == []
    world.assert_idle()

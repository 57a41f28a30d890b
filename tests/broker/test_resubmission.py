"""Requests that an earlier broker had, and that their endpoint sends again."""

from __future__ import annotations

from epd import messages as m
from epd.config import BrokerConfig
from tests.broker.world import World


def full_queue(**more: object) -> World:
    """A broker without decode workers, whose queue is as long as it may be."""
    world = World(BrokerConfig(max_queued=2, max_in_flight=5, **more))
    world.pipeline(decode=0)
    for name in ("a", "b"):
        world.submit(name, tenant=name)
    assert not world.take(m.Failed)
    return world


def test_what_was_admitted_before_is_not_refused_because_the_queue_is_full() -> None:
    world = full_queue()
    world.submit("again", attempts=1, output_token_ids=[1, 2], resumable=True)
    assert not world.take(m.Failed), "neither this one nor one that gives way to it"
    world.submit("new")
    [refused] = world.take(m.Failed)
    assert (refused.request_id, refused.code) == ("new", "overloaded")


def test_resubmitted_requests_do_not_exceed_the_bound_on_requests_in_flight() -> None:
    world = full_queue()
    for number in range(4):
        world.submit(f"again {number}", attempts=1)
    [refused] = world.take(m.Failed)
    assert (refused.request_id, refused.code) == ("again 3", "overloaded")

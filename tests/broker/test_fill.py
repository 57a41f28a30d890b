"""The picture of a pool."""

from __future__ import annotations

from broker.core.fill import cells
from epd import messages as m
from tests.broker.world import SLOT_BYTES, World


def test_an_empty_pool_is_all_free() -> None:
    assert cells(1000, [], 5) == "....."


def test_each_cell_shows_what_takes_most_of_it() -> None:
    occupied = [(0, 150, "ready"), (150, 60, "pinned"), (500, 10, "allocated")]
    assert cells(1000, occupied, 10) == "rrp..a...."


def test_the_endpoint_can_ask_how_the_pools_are_filled() -> None:
    world = World()
    world.pipeline(pool_bytes=4 * SLOT_BYTES)
    world.submit("r", ["a", "b"])
    [first, _] = world.take_jobs()
    world.say_encoded(first.peer_id, first.message)
    world.say(world.endpoint, m.GetCache())
    [state] = world.take(m.CacheState)
    [fill] = state.pools
    assert fill.bytes_by_state == {"pinned": SLOT_BYTES, "allocated": SLOT_BYTES}
    assert fill.num_patches == 2
    assert (fill.cells.count("p"), fill.cells.count("a"), fill.cells.count(".")) == (64, 64, 128)

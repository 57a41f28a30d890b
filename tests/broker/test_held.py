"""What is held where, as the broker tells endpoints."""

from __future__ import annotations

from epd import messages as m
from tests.broker.world import World


def test_what_peers_said_they_hold_is_told_to_endpoints() -> None:
    world = World()
    world.pipeline()
    for peer_id in (world.e[0], world.cache, world.endpoint):
        world.say(peer_id, m.Heartbeat(held={"fds": len(peer_id)}))
    world.core.status_board.process_held = {"fds": 9}
    status = world.core.status()
    held = {worker.name: worker.held for worker in status.workers}
    assert held["e0"] == {"fds": len(world.e[0])} and held["p0"] == {}
    assert status.peers_held == {"cache": {"fds": len(world.cache)}, "ep": {"fds": len(world.endpoint)}}
    assert status.broker_held["fds"] == 9


def test_what_the_broker_holds_itself_is_back_at_nothing_when_all_is_done() -> None:
    world = World()
    world.pipeline()
    idle = world.core.status().broker_held
    assert {"requests", "pins", "queued", "encodes"} <= idle.keys() and not any(idle.values())
    world.submit("r", ["a"])
    assert world.core.status().broker_held["requests"] == 1
    world.encode_all()
    world.finish("r", world.p[0], world.d[0])
    assert world.core.status().broker_held == idle

"""Tenants take turns: the queue by itself, and in the core for requests and for patches."""

from __future__ import annotations

from broker.policies.fairness import FairQueue
from epd import messages as m
from epd.config import BrokerConfig
from tests.broker.world import SLOT_BYTES, World


def drain(queue: FairQueue[str]) -> list[str]:
    taken = []
    while (item := queue.next()) is not None:
        queue.take(item)
        taken.append(item)
    return taken


def test_one_tenant_alone_is_served_in_order() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("a1", "a2", "a3"):
        queue.push("a", item, 5)
    assert drain(queue) == ["a1", "a2", "a3"]
    assert len(queue) == 0


def test_two_tenants_take_turns_by_cost() -> None:
    queue: FairQueue[str] = FairQueue()
    for i in range(4):
        queue.push("heavy", f"h{i}", 30)
    for i in range(6):
        queue.push("light", f"l{i}", 10)
    assert drain(queue) == ["h0", "l0", "l1", "l2", "h1", "l3", "l4", "l5", "h2", "h3"]


def test_a_tenant_that_comes_late_starts_at_the_clock_and_has_saved_nothing() -> None:
    queue: FairQueue[str] = FairQueue()
    for i in range(6):
        queue.push("a", f"a{i}", 10)
    for _ in range(3):
        queue.take(queue.next())
    for i in range(3):
        queue.push("b", f"b{i}", 10)
    assert drain(queue) == ["a3", "b0", "a4", "b1", "a5", "b2"]


def test_the_chosen_one_is_not_overtaken_by_tenants_that_come_later() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("a", "a1", 10)
    queue.take("a1")
    queue.push("a", "large", 1000)
    assert queue.next() == "large", "there is no room for it yet"
    for i in range(100):
        queue.push(f"new{i}", f"n{i}", 1)
        assert queue.next() == "large"


def test_a_tenant_that_has_had_much_is_served_although_ever_new_ones_come() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("idle", "i", 1)
    queue.push("a", "a1", 100)
    queue.push("a", "a2", 1)
    assert queue.next() == "i"
    queue.take("i")
    queue.take(queue.next())
    for i in range(1000):
        queue.push(f"new{i}", f"n{i}", 1)
        item = queue.next()
        queue.take(item)
        if item == "a2":
            return
    raise AssertionError("a2 starved")


def test_an_item_that_cannot_start_now_is_passed_over_and_keeps_its_place() -> None:
    queue: FairQueue[str] = FairQueue()
    for item in ("picture", "text1", "text2"):
        queue.push("a", item, 1, needs=item.rstrip("12"))
    assert queue.next({"picture"}) == "text1"
    queue.take("text1")
    assert drain(queue) == ["picture", "text2"]


def test_what_had_its_turn_before_comes_first_and_is_not_charged_again() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("a", "a1", 10)
    queue.push("b", "b1", 10)
    queue.take("a1")
    queue.push_front("a", "a1")
    queue.push("a", "a2", 10)
    assert drain(queue) == ["a1", "b1", "a2"]


def test_an_item_that_is_removed_is_gone_and_costs_nothing() -> None:
    queue: FairQueue[str] = FairQueue()
    queue.push("a", "a1", 100)
    queue.push("a", "a2", 1)
    queue.push("b", "b1", 1)
    queue.remove("a1")
    queue.remove("a1")
    assert drain(queue) == ["a2", "b1"]


def test_tenants_that_have_gone_are_forgotten() -> None:
    queue: FairQueue[str] = FairQueue()
    for i in range(5000):
        queue.push(f"tenant{i}", f"r{i}", 1)
        drain(queue)
    assert len(queue._tags) < 200


def test_a_tenant_with_many_requests_does_not_hold_up_another_s_one() -> None:
    world = World()
    world.pipeline(encode=0)
    for i in range(20):  # the decode worker's batch holds 8
        world.submit(f"a{i}", tenant="a")
    world.submit("b", tenant="b")
    world.take(m.Prefill)
    world.finish("a0", world.p[0], world.d[0])
    world.finish("a1", world.p[0], world.d[0])
    assert [one.leg_id for one in world.take(m.Prefill)] == ["a8", "b"], "a8 had been chosen when b came"


def test_a_thousand_patches_of_one_tenant_do_not_delay_another_s_single_one_by_all_of_them() -> None:
    world = World(BrokerConfig(encode_batches_ahead=1))
    world.pipeline(encode=1, pool_bytes=2000 * SLOT_BYTES)
    world.submit("many", [f"h{i}" for i in range(500)], tenant="a", prompt=2000)
    world.take_jobs()
    world.submit("one", ["x"], tenant="b")
    for job_id in (1, 2):
        world.say_encoded(world.e[0], world.core.patches.queue.get(job_id).message())
    assert [send.message.patch_hash for send in world.take_jobs()] == ["h16", "x"], "h16 had been chosen when x came"


def test_a_full_queue_makes_room_for_a_tenant_with_less_in_it() -> None:
    world = World(BrokerConfig(max_queued=4))
    world.pipeline(encode=0)
    for i in range(12):
        world.submit(f"a{i}", tenant="a")
    world.submit("b0", tenant="b")
    [failed] = world.take(m.Failed)
    assert (failed.request_id, failed.code, failed.status) == ("a11", "overloaded", 503)
    assert "b0" in world.core.requests
    world.submit("b1", tenant="b")
    assert [one.request_id for one in world.take(m.Failed)] == ["a10"]
    world.submit("b2", tenant="b")
    assert [one.request_id for one in world.take(m.Failed)] == ["b2"], "both have as many now"
    world.submit("a12", tenant="a")
    assert [one.request_id for one in world.take(m.Failed)] == ["a12"]


def test_a_tenant_alone_is_refused_when_the_queue_is_full() -> None:
    world = World(BrokerConfig(max_queued=2))
    world.pipeline(encode=0)
    for i in range(11):
        world.submit(f"r{i}", tenant="a")
    assert [(one.request_id, one.status) for one in world.take(m.Failed)] == [("r10", 503)]

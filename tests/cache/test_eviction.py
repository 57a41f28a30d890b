"""The order of eviction."""

from collections import OrderedDict

from hypothesis import given
from hypothesis import strategies as st

from cache.eviction import Clock, EvictionQueue


def evict(queue, clock):
    rank, key = queue.lowest()
    queue.remove(key)
    clock.advance(rank)
    return key


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.booleans()), max_size=200), st.floats(0, 10))
def test_with_equal_costs_the_least_recently_used_leaves_first(uses, cost):
    queue, clock, model = EvictionQueue(), Clock(), OrderedDict()
    for key, then_evict in uses:
        queue.put(key, clock.rank(cost))
        model[key] = None
        model.move_to_end(key)
        if then_evict:
            assert evict(queue, clock) == model.popitem(last=False)[0]
    assert len(queue) == len(model)
    assert [evict(queue, clock) for _ in range(len(queue))] == list(model)
    assert queue.lowest() is None


def test_what_costs_more_stays_longer_but_not_for_ever():
    queue, clock = EvictionQueue(), Clock()
    queue.put("dear", clock.rank(3.5))
    evicted = []
    for number in range(5):
        queue.put(f"cheap {number}", clock.rank(1.0))
        evicted.append(evict(queue, clock))
    assert evicted == ["cheap 0", "cheap 1", "cheap 2", "dear", "cheap 3"]


def test_a_removed_key_is_not_evicted_and_can_come_back_with_its_rank():
    queue, clock = EvictionQueue(), Clock()
    for key in "abc":
        queue.put(key, clock.rank(0.0))
    rank = queue.remove("a")
    assert queue.remove("a") is None and "a" not in queue
    assert queue.lowest()[1] == "b"
    queue.put("a", rank)
    assert queue.lowest()[1] == "a"


def test_the_queue_stays_small_however_often_its_keys_are_used():
    queue, clock = EvictionQueue(), Clock()
    for number in range(10_000):
        queue.put(f"{number % 10}", clock.rank(0.0))
    assert len(queue) == 10
    assert len(queue._heap) < 200

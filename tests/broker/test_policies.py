"""Orders and choices do what their names say, are configured for each stage, and see that stage's workers only."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from broker.core.stage_workers import StageWorkers
from broker.policies.choice import CHOICES
from broker.policies.costs import Cost
from broker.policies.order import ORDERS
from epd import config
from epd import messages as m
from epd.config import BrokerConfig, ConfigError
from epd.messages import Stage
from tests.broker.world import World, decode_info, encode_info, prefill_info

# ---- orders of requests ----------------------------------------------------------------------------------------------

# Name, tenant, prompt tokens, deadline; in the order in which they come.
COMERS = [("long", "t", 60, 40.0), ("short", "t", 20, 50.0), ("middle", "t", 40, 30.0)]


def starts(comers: list[tuple[str, str, int, float]], **changes: Any) -> list[str]:
    """In which order requests begin on a pipeline that has one place, which is taken when they come.

    Another waits for it already: whoever has been chosen stays the next one, whoever comes.
    """
    world = World(BrokerConfig(**changes))
    world.pipeline(decode=0)
    [p], d = world.p, world.join("d", Stage.DECODE, decode_info(max_num_seqs=1))
    world.submit("before", tenant="nobody's")
    world.submit("chosen", tenant="nobody's")
    for name, tenant, prompt, deadline_s in comers:
        world.submit(name, tenant=tenant, prompt=prompt, deadline_s=deadline_s)
    order = []
    while begun := world.take(m.Prefill):
        assert len(begun) == 1, "there is one place"
        order.append(begun[0].leg_id)
        world.finish(order[-1], p, d)
    assert order[:2] == ["before", "chosen"]
    return order[2:]


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("fcfs", ["long", "short", "middle"]),
        ("sjf", ["short", "middle", "long"]),
        ("edf", ["middle", "long", "short"]),
    ],
)
def test_requests_begin_in_the_order_that_is_configured(order: str, expected: list[str]) -> None:
    assert starts(COMERS, request_order=order) == expected


@pytest.mark.parametrize(
    ("order", "of_a", "of_b"),
    [
        ("fcfs", ["a2", "a1", "a3"], ["b2", "b1", "b3"]),
        ("sjf", ["a1", "a2", "a3"], ["b1", "b2", "b3"]),
        ("edf", ["a3", "a2", "a1"], ["b3", "b2", "b1"]),
    ],
)
def test_tenants_take_turns_under_any_order(order: str, of_a: list[str], of_b: list[str]) -> None:
    """Tenant b comes last with everything, and has all of its own in the same order as tenant a."""
    comers = [(f"{tenant}{k}", tenant, 20 * k, 50.0 - 10 * k) for tenant in "ab" for k in (2, 1, 3)]
    order_of = starts(comers, request_order=order)
    assert [one for one in order_of if one[0] == "a"] == of_a
    assert [one for one in order_of if one[0] == "b"] == of_b
    assert {order_of[0][0], order_of[1][0]} == {"a", "b"}, order_of
    used = {"a": 0, "b": 0}
    for one in order_of[:-1]:
        used[one[0]] += 20 * int(one[1])
        assert abs(used["a"] - used["b"]) <= 60, "nobody is ahead by more than the largest request"


# ---- orders of patches -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("order", "expected"),
    [("fcfs", ["large", "small", "middle"]), ("sjf", ["small", "middle", "large"]),
     ("edf", ["middle", "large", "small"])],
)  # fmt: skip
def test_patches_are_encoded_in_the_order_that_is_configured(order: str, expected: list[str]) -> None:
    world = World(BrokerConfig(patch_order=order, encode_batches_ahead=1))
    world.pipeline(encode=0)
    world.join("e", Stage.ENCODE, encode_info(max_batch_tokens=4))  # so it has one patch at a time
    world.submit("r0", ["before"])
    for name, tokens, deadline_s in (("large", 12, 40.0), ("small", 4, 50.0), ("middle", 8, 30.0)):
        world.submit(name, [name], tokens=tokens, deadline_s=deadline_s)
    assert [job.patch_hash for _, job in world.encode_all()] == ["before", *expected]


@pytest.mark.parametrize("order", ORDERS)
def test_one_order_is_for_requests_and_another_for_patches(order: str) -> None:
    assert starts(COMERS, patch_order=order) == ["long", "short", "middle"]


# ---- choices, in the core --------------------------------------------------------------------------------------------


def two_prefills(**changes: Any) -> World:
    world = World(BrokerConfig(**changes))
    world.pipeline(prefill=2)
    return world


def prefills(world: World) -> str:
    """Which prefill workers have been given legs since this was last asked, by their numbers."""
    return "".join(world.names[send.peer_id][1] for send in world.take_sends(m.Prefill))


def test_round_robin_gives_to_each_in_turn_whatever_it_has() -> None:
    world = two_prefills(prefill_choice="round_robin")
    for i, prompt in enumerate((500, 10, 500, 10, 10)):
        world.submit(f"r{i}", prompt=prompt)
    assert prefills(world) == "01010"


def test_least_loaded_gives_to_whoever_has_the_fewest_tokens() -> None:
    world = two_prefills(prefill_choice="least_loaded")
    for i, prompt in enumerate((500, 10, 20, 300, 300)):
        world.submit(f"r{i}", prompt=prompt)
    assert prefills(world) == "01111"


def report(world: World, peer_id: str, s_per_unit: float) -> None:
    world.say(peer_id, m.Heartbeat(work=m.Work(busy_s=1000 * s_per_unit, num_units=1000)))


def test_least_loaded_counts_in_seconds_once_workers_have_said_what_their_work_takes() -> None:
    world = two_prefills(prefill_choice="least_loaded")
    report(world, world.p[0], s_per_unit=0.01)
    report(world, world.p[1], s_per_unit=0.001)
    for i in range(8):
        world.submit(f"r{i}", prompt=100)
    # A second each there, a tenth of one here: ten fit here until both have as much.
    assert sorted(prefills(world)) == ["0"] + ["1"] * 7


def test_a_worker_that_has_said_nothing_counts_as_the_average_of_the_others() -> None:
    world = World()
    world.pipeline(prefill=3)
    report(world, world.p[0], s_per_unit=0.01)
    report(world, world.p[1], s_per_unit=0.03)
    for i in range(6):
        world.submit(f"r{i}", prompt=100)  # 1, 3 and 2 seconds
    assert prefills(world) == "012020"


def test_affine_gives_to_whoever_has_had_the_beginning_until_that_is_much_busier() -> None:
    world = two_prefills(prefill_choice="affine")
    world.submit("r0", prompt=100, prefix_hashes=["x"])
    world.submit("r1", prompt=100, prefix_hashes=["x"])  # waiting for 100 tokens there takes no longer than 100 here
    assert prefills(world) == "00"
    world.submit("r2", prompt=100, prefix_hashes=["x"])  # waiting for 200 does
    assert prefills(world) == "1"
    world.submit("r3", prompt=90, prefix_hashes=["y"])  # nobody's: to the least loaded
    assert prefills(world) == "1"


def test_affine_prefers_the_longest_beginning_that_is_known() -> None:
    world = two_prefills(prefill_choice="affine")
    world.submit("r0", prompt=100, prefix_hashes=["system"])
    world.submit("r1", prompt=100, prefix_hashes=["other", "other question"])
    assert prefills(world) == "01"
    world.submit("r2", prompt=100, prefix_hashes=["system", "other question"])
    assert prefills(world) == "1"


def test_affine_knows_patches_too() -> None:
    world = two_prefills(prefill_choice="affine")
    world.submit("r0", ["h1"], prompt=10)
    world.submit("r1", ["h2"], prompt=10)
    world.submit("r2", ["h2"], prompt=10)
    world.submit("r3", ["h1"], prompt=10)
    assert prefills(world) == "0110"


def test_a_favourite_that_is_gone_is_nobody() -> None:
    world = two_prefills(prefill_choice="affine")
    world.submit("r0", prompt=10, prefix_hashes=["x"])
    world.say(world.p[0], m.Goodbye())
    world.take(m.Prefill)
    world.submit("r1", prompt=10, prefix_hashes=["x"])
    assert prefills(world) == "1"


@pytest.mark.parametrize("stage", Stage)
def test_each_stage_has_a_choice_of_its_own(stage: Stage) -> None:
    world = World(BrokerConfig(**{f"{stage}_choice": "round_robin"}))
    names = {one: type(world.core.stages[one].choice).__name__ for one in Stage}
    assert names == {one: "RoundRobin" if one is stage else "LeastLoaded" for one in Stage}


def decodes(world: World) -> str:
    return "".join(world.names[send.peer_id][1] for send in world.take_sends(m.Decode))


@pytest.mark.parametrize(("choice", "expected"), [("round_robin", "0101"), ("least_loaded", "0111")])
def test_decode_workers_are_chosen_as_configured(choice: str, expected: str) -> None:
    world = World(BrokerConfig(decode_choice=choice))
    world.pipeline(decode=2)
    for i, prompt in enumerate((1000, 10, 20, 30)):
        world.submit(f"r{i}", prompt=prompt)
    assert decodes(world) == expected


@pytest.mark.parametrize(("choice", "expected"), [("round_robin", "0101"), ("least_loaded", "0111")])
def test_encode_workers_are_chosen_as_configured(choice: str, expected: str) -> None:
    world = World(BrokerConfig(encode_choice=choice))
    world.pipeline(encode=2)
    for i, tokens in enumerate((32, 4, 8, 12)):
        world.submit(f"r{i}", [f"h{i}"], tokens=tokens)
    assert "".join(world.names[send.peer_id][1] for send in world.take_jobs()) == expected


def test_an_encode_worker_that_has_enough_loses_its_turn_and_holds_nobody_up() -> None:
    world = World(BrokerConfig(encode_choice="round_robin", encode_batches_ahead=1))
    world.pipeline(encode=2)
    world.submit("r0", [f"h{i}" for i in range(4)], tokens=32)  # two each, which is all they take
    jobs = world.take_jobs()
    assert [world.names[send.peer_id] for send in jobs] == ["e0", "e0", "e1", "e1"]
    world.submit("r1", ["h4", "h5"], tokens=32)
    assert not world.take_jobs()
    for send in jobs[2:]:  # it would be e0's turn
        world.say_encoded(send.peer_id, send.message)
        assert [world.names[one.peer_id] for one in world.take_jobs()] == ["e1"]


@pytest.mark.parametrize("name", ["request_order", "patch_order", "encode_choice", "prefill_choice", "decode_choice"])
def test_a_policy_that_there_is_not_is_refused_with_the_name_of_the_key(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        config.load(None, [f"broker.{name}=fastest"])


def test_all_policies_can_be_configured() -> None:
    for order in ORDERS:
        assert config.load(None, [f"broker.request_order={order}"]).broker.request_order == order
    for choice in CHOICES:
        assert config.load(None, [f"broker.prefill_choice={choice}"]).broker.prefill_choice == choice


# ---- choices by themselves -------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Candidate:
    peer_id: str
    load_units: int = 0
    num_tasks: int = 0
    room_units: int = 100
    host: str = "h"
    cost: Cost = dataclasses.field(default_factory=Cost)


@pytest.mark.parametrize("choice", CHOICES)
def test_no_choice_takes_a_worker_that_cannot_take_the_work_or_is_of_another_host(choice: str) -> None:
    workers = StageWorkers(CHOICES[choice]())
    near, full, far = Candidate("near", 50), Candidate("full", 0, room_units=0), Candidate("far", 10, host="g")
    for one in (far, full, near):
        workers.add(one)
    workers.give(full, ["x"])
    takes = lambda one: one.room_units > 0  # noqa: E731
    assert workers.best(takes, keys=["x"], num_units=1000) is far
    assert workers.best(takes, host="h", keys=["x"], num_units=1000) is near
    assert workers.best(takes, host="nowhere") is None
    assert workers.best(lambda one: False) is None


@pytest.mark.parametrize("choice", CHOICES)
def test_the_worker_with_most_room_is_found_behind_many_that_have_none(choice: str) -> None:
    workers = StageWorkers(CHOICES[choice]())
    for i in range(100):
        workers.add(Candidate(f"w{i}", load_units=i, room_units=1 if i < 99 else 50))
    found = workers.best(lambda one: one.room_units >= 50)
    assert found is not None
    assert found.peer_id == "w99"


# ---- stages ----------------------------------------------------------------------------------------------------------


def to(world: World, peer_id: str) -> set[str]:
    """What kinds of messages a worker was sent since this was last asked."""
    found = {type(send.message).__name__ for send in world.sent if send.peer_id == peer_id}
    world.sent.clear()
    return found


def test_a_worker_that_serves_another_stage_gets_that_stages_work_only() -> None:
    world = World()
    world.pipeline(encode=2, prefill=1, decode=1)
    worker = world.e[1]
    world.submit("r0", ["h0", "h1"])
    assert to(world, worker) == {"Encode"}
    world.say(
        worker, m.Encoded(jobs=[done(job) for job in world.core.registry.workers[worker].jobs.values()], took_s=0.1)
    )
    world.say(worker, m.Serves(stage=Stage.PREFILL, info=prefill_info("e1")))
    to(world, worker)
    for i in range(1, 5):
        world.submit(f"r{i}", [f"h{i}0", f"h{i}1"], prompt=32)
    assert to(world, worker) == {"Prefill"}
    world.encode_all()
    assert to(world, worker) <= {"Ready"}
    for leg in list(world.core.registry.workers[worker].legs):
        world.finish(leg.leg_id, worker, world.d[0])
    world.say(worker, m.Serves(stage=Stage.DECODE, info=decode_info()))
    to(world, worker)
    for i in range(5, 9):
        world.submit(f"r{i}", prompt=32)
    assert to(world, worker) == {"Decode"}


def done(job: Any) -> m.EncodedJob:
    return m.EncodedJob(job_id=job.job_id, generation=job.slot.generation)


def test_what_a_stage_has_learnt_of_a_workers_cost_does_not_go_with_it_to_another() -> None:
    world = World()
    world.pipeline(encode=2)
    worker = world.e[1]
    report(world, worker, s_per_unit=9.0)
    world.say(worker, m.Serves(stage=Stage.PREFILL, info=prefill_info("e1")))
    assert world.core.registry.workers[worker].cost.s_per_unit == 0.0
    assert not world.core.stages[Stage.ENCODE].choice.is_known


def test_a_worker_that_still_has_work_does_not_change_its_stage() -> None:
    world = World()
    world.pipeline(encode=2)
    world.submit("r0", ["h0", "h1"])
    num_fenced = world.core.counters().num_fenced
    world.say(world.e[1], m.Serves(stage=Stage.PREFILL, info=prefill_info("e1")))
    assert world.core.counters().num_fenced == num_fenced + 1
    assert world.core.registry.workers[world.e[1]].stage is Stage.ENCODE


def test_the_only_worker_of_a_stage_that_leaves_it_is_waited_for_there() -> None:
    world = World()
    world.pipeline(encode=1)
    world.say(world.e[0], m.Serves(stage=Stage.PREFILL, info=prefill_info("e0")))
    world.submit("r0", ["h0"])
    assert len(world.core.queue) == 1
    world.say(world.e[0], m.Serves(stage=Stage.ENCODE, info=encode_info()))
    assert len(world.core.queue) == 0
    assert [send.peer_id for send in world.take_jobs()] == [world.e[0]]

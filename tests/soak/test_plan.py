from __future__ import annotations

import collections

import pytest

from tests.soak.plan import CALM_S, NUM_PROMPTS, VICTIMS, make_plan, make_prompts


def test_the_same_seed_gives_the_same_plan_and_another_one_another() -> None:
    assert make_plan(7, 120) == make_plan(7, 120)
    assert make_plan(7, 120) != make_plan(8, 120)


def test_prompts_are_always_the_same_and_of_every_kind() -> None:
    prompts = make_prompts()
    assert prompts == make_prompts()
    assert len(prompts) == NUM_PROMPTS
    pictures = collections.Counter(len(body["messages"][0]["content"]) - 1 for body in prompts)
    assert pictures.keys() == {0, 1, 2, 3, 4}
    assert all(any(key in body for body in prompts) for key in ("n", "presence_penalty", "response_format"))


@pytest.mark.parametrize("seed", range(5))
def test_a_plan_has_every_kind_of_client_and_fault_and_a_calm_end(seed: int) -> None:
    plan = make_plan(seed, 600)
    assert {fault.kind for fault in plan.faults} == {"kill", "stop", "drain"}
    assert {fault.victim for fault in plan.faults} == set(VICTIMS)
    assert all(fault.victim not in ("cache", "broker") for fault in plan.faults if fault.kind == "drain")
    assert max(fault.at_s for fault in plan.faults) <= 600 - CALM_S
    assert 60 < len(plan.faults) < 200
    assert len(plan.asks) > 1200 + 500
    for kind in ("stream", "salt", "leaves_after_s", "cancels_after_s"):
        assert 0 < sum(bool(getattr(ask, kind)) for ask in plan.asks) < len(plan.asks), kind
    assert [ask.number for ask in plan.asks] == list(range(len(plan.asks)))
    assert [ask.at_s for ask in plan.asks] == sorted(ask.at_s for ask in plan.asks)


def test_the_printed_plan_has_a_line_for_everything_that_happens() -> None:
    plan = make_plan(3, 60)
    assert len(plan.lines()) == 1 + len(plan.asks) + len(plan.faults)

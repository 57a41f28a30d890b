"""The first token is sampled by a prefill engine, and a decode engine goes on after it: two real engines.

What the engines are told, and when, is decided by the tests (see kv_engine.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.workers.kv_pair import Pair, idle

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]


@pytest.fixture(autouse=True)
def nothing_is_left(pair: Pair) -> Iterator[None]:
    """After each case both engines hold nothing and answer as before."""
    yield
    pair.settle()
    assert pair.undisturbed() == pair.truth


def sampled(pair: Pair, request_id: str) -> list[int]:
    """What the prefill engine has sampled."""
    for _ in range(10):
        pair.p.step()
        if tokens := pair.p.state()["tokens"].get(request_id):
            return tokens
    raise AssertionError("nothing was sampled")


def decoded(pair: Pair, request_id: str) -> list[int]:
    return pair.d.state()["tokens"].get(request_id, [])


def push(pair: Pair, request_id: str) -> None:
    """Lets both run until the KV has come to the decode engine."""
    for _ in range(40):
        pair.p.settle(0.05), pair.d.settle(0.05)
        if request_id in pair.d.state()["lacking"]:
            return
    raise AssertionError(f"no KV came: {pair.p.state()} {pair.d.state()}")


def test_a_token_that_comes_before_the_kv_is_gone_on_after(pair: Pair) -> None:
    request_id = pair.begin(samples=True)
    first = sampled(pair, request_id)
    pair.d.give(request_id, first)
    pair.settle()
    assert first + decoded(pair, request_id) == pair.truth


def test_kv_that_comes_before_the_token_waits_for_it(pair: Pair) -> None:
    request_id = pair.begin(samples=True)
    first = sampled(pair, request_id)
    push(pair, request_id)
    pair.d.step(5)
    assert decoded(pair, request_id) == []
    pair.d.give(request_id, first)
    pair.settle()
    assert first + decoded(pair, request_id) == pair.truth


def test_the_token_that_is_given_is_the_one_that_is_gone_on_after(pair: Pair) -> None:
    request_id = pair.begin(samples=True)
    first = sampled(pair, request_id)
    pair.d.give(request_id, [first[0] + 1])
    pair.settle()
    assert len(decoded(pair, request_id)) == 3, "it counts towards the length of the answer"
    assert decoded(pair, request_id) != pair.truth[1:]


def test_an_answer_of_one_token_leaves_nothing_at_prefill_though_nobody_comes_for_its_kv(pair: Pair) -> None:
    pair.p.add("one-token", 1, None, True)
    assert sampled(pair, "one-token") == pair.truth[:1]
    pair.p.step()
    state = pair.p.state()
    assert (state["held"], state["blocks"], state["requests"]) == (0, 0, []), state


def test_without_a_token_the_decode_engine_samples_it_itself(pair: Pair) -> None:
    request_id = pair.begin(samples=True)
    sampled(pair, request_id)
    push(pair, request_id)
    pair.d.give(request_id, [])
    pair.settle()
    assert decoded(pair, request_id) == pair.truth


@pytest.mark.parametrize("has_kv", [True, False])
def test_a_request_that_is_aborted_while_it_awaits_its_token_leaves_nothing(pair: Pair, has_kv: bool) -> None:
    request_id = pair.begin(samples=True)
    sampled(pair, request_id)
    if has_kv:
        push(pair, request_id)
    pair.d.abort(request_id), pair.p.abort(request_id)
    pair.settle()
    assert idle(pair.d.state()) and idle(pair.p.state())
    pair.d.give(request_id, [5])  # too late
    assert idle(pair.d.state())


@pytest.mark.parametrize("num_tokens", [127, 128, 129])  # a block is 128
def test_the_token_may_be_the_last_of_a_block_or_the_first_of_the_next(pair: Pair, num_tokens: int) -> None:
    pair.p.prompt_of(num_tokens), pair.d.prompt_of(num_tokens)
    try:
        request_id = pair.begin(num_tokens=8)
        pair.settle()
        truth = decoded(pair, request_id)
        assert len(truth) == 8
        request_id = pair.begin(num_tokens=8, samples=True)
        first = sampled(pair, request_id)
        pair.d.give(request_id, first)
        pair.settle()
        assert first + decoded(pair, request_id) == truth
    finally:
        pair.p.prompt_of(200), pair.d.prompt_of(200)

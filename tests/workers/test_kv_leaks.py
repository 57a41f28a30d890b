"""What is left of a request's KV when it is aborted, refused or its peer dies: nothing, on either side, within seconds.

Two real engines in processes of their own (see kv_engine.py), stepped by the tests. What vLLM's own connector leaves in
these cases is in docs/adr/0011-pushes-can-be-called-off.md.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from tests.workers.kv_pair import WITHIN_S, Pair, idle

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]


@pytest.fixture(autouse=True)
def works_afterwards(pair: Pair) -> Iterator[None]:
    """After each case both engines hold nothing and answer as before."""
    yield
    pair.p.heal()
    pair.settle()
    assert pair.undisturbed() == pair.truth


def test_decode_aborted_before_the_push_frees_its_blocks_when_prefill_refuses(pair: Pair) -> None:
    request_id = pair.begin()
    assert pair.d.state()["blocks"] > 0
    pair.d.abort(request_id)
    pair.d.settle(WITHIN_S)
    assert idle(pair.d.state()), "prefill has not stepped: its connector has answered by itself"
    pair.settle()
    assert pair.p.state()["ended"][request_id] == "length", "prefill went on, and its blocks are free as well"


def test_decode_aborted_before_it_is_scheduled_leaves_nothing(pair: Pair) -> None:
    pair.d.add("unscheduled", 4, pair.peer)
    pair.d.abort("unscheduled")
    pair.settle()


@pytest.mark.parametrize("order", ["decode first", "prefill first"])
def test_both_aborted_before_the_push(pair: Pair, order: str) -> None:
    request_id = pair.begin()
    for side in (pair.d, pair.p) if order == "decode first" else (pair.p, pair.d):
        side.abort(request_id)
        side.run(0.3)
    pair.settle()


def test_both_aborted_before_decode_has_registered(pair: Pair) -> None:
    pair.p.add("unregistered")
    pair.d.add("unregistered", 4, pair.peer)
    pair.p.abort("unregistered")
    pair.p.run(0.3)
    pair.d.step(1)
    pair.d.abort("unregistered")
    pair.settle()


def test_both_aborted_during_the_push_keep_their_blocks_until_it_is_over(pair: Pair) -> None:
    pair.p.hold_writes()
    request_id = pair.begin()
    pair.p.run(0.5)
    for side in (pair.d, pair.p):
        side.abort(request_id)
    pair.p.run(0.5)
    assert pair.p.state()["blocks"] > 0, "the write still reads them"
    pair.p.heal()
    pair.settle()


def test_prefill_aborted_after_it_has_finished_and_nobody_has_registered_frees_its_blocks_at_once(pair: Pair) -> None:
    pair.p.add("unwanted")
    pair.p.step(3)
    assert pair.p.state()["blocks"] > 0
    pair.p.abort("unwanted")
    assert pair.p.settle(WITHIN_S) < WITHIN_S, "long before its lease ends"


def test_prefill_aborted_alone_ends_the_decode_request_with_an_error(pair: Pair) -> None:
    request_id = pair.begin()
    pair.p.abort(request_id)
    pair.settle()
    assert pair.d.state()["ended"][request_id] == "error"


def test_a_registration_that_comes_after_the_lease_is_refused(pair: Pair) -> None:
    pair.p.lease(0.5)
    pair.p.add("late")
    pair.p.settle(WITHIN_S)
    pair.p.lease(15)
    assert idle(pair.p.state())
    pair.d.add("late", 4, pair.peer)
    pair.settle()
    assert pair.d.state()["ended"]["late"] == "error"


@pytest.mark.parametrize("how", ["fail_writes", "refuse_writes"])
def test_a_push_that_fails_ends_the_decode_request_with_an_error(pair: Pair, how: str) -> None:
    getattr(pair.p, how)()
    request_id = pair.begin()
    pair.settle()
    assert pair.d.state()["ended"][request_id] == "error"


def test_an_invalid_notification_does_no_harm(pair: Pair) -> None:
    request_id = pair.begin()
    for garbage in ("nonsense", "EPD_REFUSED:nobody:1", "EPD_REFUSED:", "PUSH_REG:", "PUSH_REG:\x93\x01"):
        pair.p.hear(garbage)
        pair.d.hear(garbage)
    pair.settle()
    assert pair.d.state()["ended"][request_id] == "length"


def test_requests_whose_ids_differ_only_at_the_end_are_not_mixed_up(pair: Pair) -> None:
    for suffix in ("0badcafe", "0badf00d"):
        pair.p.add(f"same-{suffix}")
    pair.d.add("same-0badf00d", 4, pair.peer)
    for _ in range(20):
        pair.p.run(0.05), pair.d.run(0.05)
    assert "same-0badf00d" in pair.d.state()["ended"]
    assert pair.p.state()["requests"] == ["same-0badcafe"], "the other one is not taken for it"
    pair.p.abort("same-0badcafe")
    pair.settle()


def test_a_prefill_worker_that_hangs_may_still_write_so_the_blocks_stay_until_it_answers(pair: Pair) -> None:
    request_id = pair.begin()
    pair.p.signal(signal.SIGSTOP)
    try:
        assert pair.d.missing(request_id) == 0
        pair.d.abort(request_id)
        pair.d.run(3.0)
        assert pair.d.state()["blocks"] > 0
        assert pair.d.missing() == pair.d.state()["blocks"], "which is what the leak watch counts"
    finally:
        pair.p.signal(signal.SIGCONT)
    pair.settle()


@pytest.mark.parametrize("replaced", ["before the abort", "after the abort"])
def test_a_prefill_worker_killed_while_decode_waits(pair: Pair, replaced: str) -> None:
    request_id = pair.begin()
    pair.p.signal(signal.SIGKILL)
    if replaced == "before the abort":
        pair.replace("p")
    pair.d.run(0.5)
    assert pair.d.state()["blocks"] > 0, "the broker has not told it yet"
    pair.d.abort(request_id)
    assert pair.d.settle(WITHIN_S) < WITHIN_S
    if replaced == "after the abort":
        pair.replace("p")


def test_a_decode_worker_killed_while_prefill_holds_blocks_for_it(pair: Pair) -> None:
    told = pair.begin()
    pair.p.lease(4.0)
    not_told = pair.begin()
    pair.p.lease(15)
    pair.d.signal(signal.SIGKILL)
    pair.p.step(2)
    pair.p.abort(told)
    pair.p.run(0.5)
    assert told not in pair.p.state()["requests"], "at once"
    assert pair.p.settle(WITHIN_S) < WITHIN_S, f"{not_told} when its lease has ended, or its write has failed"
    pair.replace("d")

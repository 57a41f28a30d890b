from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from workers.leaks import LeakWatch


def look(watch: LeakWatch, now: float, in_use: int, wanted: int = 0) -> str:
    return watch.observe(now, num_blocks=100, num_in_use=in_use, num_wanted=wanted)


def test_blocks_of_known_requests_are_not_a_leak_however_many_there_are() -> None:
    watch = LeakWatch(fraction=0.25, patience_s=60)
    assert not any(look(watch, now, in_use=100, wanted=90) for now in range(0, 1000, 10))


def test_many_blocks_held_for_nobody_for_long_are_a_leak_and_the_reason_has_the_numbers() -> None:
    watch = LeakWatch(fraction=0.25, patience_s=60)
    assert look(watch, 0, in_use=40, wanted=10) == ""
    assert look(watch, 59, in_use=40, wanted=10) == ""
    assert look(watch, 60, in_use=40, wanted=10) == "30 of 100 KV blocks have belonged to nobody for 60 s"


def test_few_blocks_may_be_missing_for_ever() -> None:
    watch = LeakWatch(fraction=0.25, patience_s=60)
    assert not any(look(watch, now, in_use=25) for now in range(0, 1000, 10))


def test_the_patience_begins_again_when_blocks_have_come_back() -> None:
    watch = LeakWatch(fraction=0.25, patience_s=60)
    look(watch, 0, in_use=50)
    look(watch, 50, in_use=20)
    assert look(watch, 70, in_use=50) == ""
    assert look(watch, 129, in_use=50) == ""
    assert look(watch, 130, in_use=50) != ""


@given(st.lists(st.tuples(st.floats(0, 50), st.integers(0, 100)), max_size=50))
def test_it_never_says_leak_before_its_patience_is_over(looks: list[tuple[float, int]]) -> None:
    watch, now, last_fine = LeakWatch(fraction=0.25, patience_s=60), 0.0, 0.0
    for step_s, missing in looks:
        now += step_s
        if missing <= 25:
            last_fine = now
        if look(watch, now, in_use=missing):
            assert now - last_fine >= 60

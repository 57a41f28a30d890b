"""A real encode engine that is given items its encoder cannot take (see encode_engine.py): they fail, and only they."""

from __future__ import annotations

import pytest

from tests.forks import Forks

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def told(forks: Forks) -> dict[str, list]:
    """What the engine's process says."""
    return forks.run("tests.workers.encode_engine")


def test_the_items_really_have_other_shapes(told: dict[str, list]) -> None:
    good, small, large = told["shapes"]
    assert good[-2:] == [64, 64] and small[-2:] == [32, 32] and large[-2:] == [128, 128]


def test_an_item_that_the_encoder_fails_on_fails_alone(told: dict[str, list]) -> None:
    first, bad, last = told["one is bad"]
    assert (first, last) == ("encoded", "encoded") and "the encoder failed on it" in bad


def test_an_item_that_is_padded_to_those_beside_it_does_not_fit_its_slot(told: dict[str, list]) -> None:
    first, bad, last = told["a small one among others"]
    assert (first, last) == ("encoded", "encoded") and "the slot is for" in bad


@pytest.mark.parametrize("batch", ["all are bad", "bad alone"])
def test_where_all_are_bad_all_are_told_why(told: dict[str, list], batch: str) -> None:
    assert all("the encoder failed on it" in each for each in told[batch])


def test_an_item_without_a_field_fails_alone(told: dict[str, list]) -> None:
    first, bad, last = told["without pixels"]
    assert (first, last) == ("encoded", "encoded") and bad not in ("encoded", "nothing")


def test_another_number_of_embeddings_than_the_slot_is_for_is_that_jobs_failure(told: dict[str, list]) -> None:
    assert "the slot is for" in told["another number of tokens"][0]


@pytest.mark.parametrize("batch", ["too many tokens", "no tokens"])
def test_what_would_never_be_scheduled_is_refused(told: dict[str, list], batch: str) -> None:
    assert "embeddings" in told[batch][0]


def test_the_engine_goes_on_and_holds_nothing(told: dict[str, list]) -> None:
    assert told["good"] == told["good again"] == ["encoded"] * 3
    held, num_requests = told["held"]
    assert not any(held.values()) and num_requests == 0

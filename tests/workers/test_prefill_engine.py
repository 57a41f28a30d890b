"""A real prefill engine whose patches come late, in a process of its own (see prefill_engine.py)."""

from __future__ import annotations

import pytest

from tests.forks import Forks

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def told(forks: Forks) -> dict[str, list]:
    """What the engine's process says."""
    return forks.run("tests.workers.prefill_engine")


def test_nothing_runs_while_too_little_is_ready_to_be_worth_a_step(told: dict[str, list]) -> None:
    assert told["before any patch"] == [False, 0]


def test_tokens_whose_embeddings_have_arrived_are_prefilled_while_later_patches_are_missing(told: dict) -> None:
    assert told["with three patches"] == [True, 3 * 16 + 12], "up to the first patch that is missing"
    assert told["and nothing new"] == [False, 3 * 16 + 12]


def test_a_prompt_prefilled_in_pieces_has_the_log_probabilities_of_one_prefilled_whole(told: dict) -> None:
    assert told["log-probabilities"] == [8 * 16 + 12 - 1, True]


def test_no_embedding_is_held_anywhere_once_its_tokens_are_prefilled(told: dict) -> None:
    assert told["held"] == [0, 0, 0], "model runner's encoder cache, connector, encoder cache manager"

"""A real prefill engine of an M-RoPE model with one video, in a process of its own (see mrope_engine.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.forks import Forks

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen3_vl"])
def told(request: pytest.FixtureRequest, forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the engine's process says."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    return forks.run("tests.workers.mrope_engine", request.param, str(folder))


def test_it_holds_no_tower_even_if_deepstack_needed_one_to_be_made(told: dict) -> None:
    tower_bytes, language_bytes = told["bytes"]
    assert tower_bytes == 0
    assert language_bytes > 100_000


def test_items_without_fitting_metadata_are_refused_and_cost_nobody_else_anything(told: dict) -> None:
    missing, mismatched, malformed = told["refused"]
    assert "without its grid" in missing
    assert "does not fit its 24 tokens" in mismatched
    assert "three integers" in malformed
    assert told["after refusals"] is False, "nothing of them is in the engine"


def test_text_before_a_video_is_prefilled_while_one_of_its_grids_is_missing(told: dict) -> None:
    assert told["three of four"] == [True, 20]
    assert told["still three"] == [False, 20]


def test_grids_that_come_in_any_order_give_the_same_log_probabilities(told: dict) -> None:
    assert told["late"] == 0.0


def test_log_probabilities_tell_where_embeddings_are_so_that_wrong_positions_would_show(told: dict) -> None:
    """More than ten times the tolerance of tests/models/test_m_rope.py, with the same embeddings."""
    assert told["turned"] > 0.3, "height and width exchanged"
    if "pieces" in told:
        assert told["pieces"] > 0.3, "an item for each grid: positions start again at each"


def test_no_embedding_is_held_anywhere_once_its_tokens_are_prefilled(told: dict) -> None:
    assert told["held"] == [0, 0, 0], "model runner's encoder cache, connector, encoder cache manager"

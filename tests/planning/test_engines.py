"""The arithmetic against real engines of the built-in model, and activations against what a process is seen to use."""

from __future__ import annotations

from typing import Any

import pytest

from epd.builtin import model_path
from epd.planning.activations import kv_bytes, layer_bytes
from epd.planning.configs import dtype_bytes, find_config
from epd.planning.shapes import Stack, shape_of
from tests.forks import Forks
from tests.planning.stage_engine import DTYPE, KV_BYTES

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

NUM_PATCHES = 8
ITEMSIZE = dtype_bytes(DTYPE)


@pytest.fixture(scope="module")
def engines(forks: Forks) -> dict[str, dict[str, Any]]:
    """What each stage's engine holds."""
    return {stage: forks.run("tests.planning.stage_engine", stage) for stage in ("encode", "prefill", "decode")}


def test_each_stage_holds_the_bytes_of_its_counted_parameters(engines: dict[str, dict[str, Any]]) -> None:
    from epd.planning.weights import count_parameters

    _, config = find_config(str(model_path()))
    counted, text = count_parameters(config), config["text_config"]
    tower = ITEMSIZE * (counted.tower + counted.projector)
    assert (engines["encode"]["tower"], engines["encode"]["language"]) == (tower, 0)
    # vLLM pads the vocabulary of the input embedding and the output head to a multiple of 64.
    padding = 2 * (engines["decode"]["padded_vocabulary"] - text["vocab_size"]) * text["hidden_size"]
    for stage in ("prefill", "decode"):
        assert (engines[stage]["tower"], engines[stage]["language"]) == (0, ITEMSIZE * (counted.language + padding))


def test_kv_of_a_token_is_that_of_vllms_own_blocks(engines: dict[str, dict[str, Any]]) -> None:
    shape = shape_of(find_config("builtin")[1], 256, 128)
    per_token = kv_bytes(shape.text, dtype_bytes=ITEMSIZE)
    for stage in ("prefill", "decode"):
        told = engines[stage]
        assert told["page_bytes"] == per_token * told["block_size"]
        assert told["kv_capacity_tokens"] == told["num_blocks"] * told["block_size"]
        whole_blocks = KV_BYTES // per_token // told["block_size"] * told["block_size"]
        assert told["kv_capacity_tokens"] == whole_blocks
    assert engines["encode"]["kv_capacity_tokens"] == 0


def test_the_estimated_peak_of_encoding_is_of_the_size_that_is_measured(
    forks: Forks, capsys: pytest.CaptureFixture[str]
) -> None:
    stack = Stack(num_layers=2, width=1152, inner=4304, num_heads=16, num_kv_heads=16, head_dim=72, gated=False)
    estimate = NUM_PATCHES * layer_bytes(stack, positions=1024, dtype_bytes=2)
    told = forks.run("tests.planning.peak", str(NUM_PATCHES + 1), timeout_s=150)
    measured = told["grown"]
    with capsys.disabled():
        sizes = f"estimated {estimate / 2**20:.0f} MiB, measured {measured / 2**20:.0f} MiB"
        print(f"\n{NUM_PATCHES} patches more, {told['attention']} attention: {sizes}")
    assert estimate / 2 < measured < estimate * 5, "the memory of a process says no more than this"

"""Patches of pictures, activations, and what fits: arithmetic that can be done by hand."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from epd import builtin
from epd.config import ConfigError
from epd.planning import pictures
from epd.planning.activations import EAGER, encode_bytes, kv_bytes, layer_bytes, prefill_bytes
from epd.planning.configs import find_config, own_dtype
from epd.planning.memory import Row, Setting, Weights, most_images, plan
from epd.planning.paper import CLAIMS, SIZES
from epd.planning.shapes import Picture, Shape, Stack, shape_of

STACK = Stack(num_layers=2, width=100, inner=400, num_heads=4, num_kv_heads=4, head_dim=25, gated=False)
TEXT = Stack(num_layers=3, width=100, inner=300, num_heads=4, num_kv_heads=2, head_dim=25, gated=True)
SHAPE = Shape(
    family="made up",
    tower=STACK,
    text=TEXT,
    max_model_len=1000,
    picture=Picture(num_patches=2, positions=10, tokens=5, num_extra_tokens=3),
)


@pytest.mark.parametrize(
    ("size", "minicpm", "internvl"), [(SIZES[0], 1, 13), (SIZES[1], 3, 3), (SIZES[2], 10, 13), ((448, 448), 1, 1)]
)
def test_pictures_are_cut_into_the_patches_that_the_papers_limits_tell(
    size: tuple, minicpm: int, internvl: int
) -> None:
    assert pictures.minicpm_slices(*size, side=448, most=9) == minicpm
    assert pictures.internvl_tiles(*size, tile=448, most=12, thumbnail=True) == internvl


def test_more_tiles_of_the_same_shape_need_the_pixels_for_them() -> None:
    def count(width: int, height: int) -> int:
        return pictures.internvl_tiles(width, height, tile=448, most=12, thumbnail=False)

    assert count(896, 448) == 2
    assert count(1792, 896) == 8


def test_the_built_in_models_picture_has_nine_patches_and_a_square_one_more() -> None:
    assert pictures.idefics3_tiles(256, 128, tile=64, longest=256) == 9
    assert pictures.idefics3_tiles(500, 500, tile=64, longest=256) == 17


def test_pictures_of_qwen_are_as_large_as_they_are_up_to_a_limit() -> None:
    assert pictures.area_positions(280, 560, patch=14, merge=2, most_pixels=10**7) == 20 * 40
    limited = pictures.area_positions(2800, 5600, patch=14, merge=2, most_pixels=280 * 560)
    assert limited == 20 * 40


def test_a_layer_peaks_in_its_mlp_or_in_its_attention() -> None:
    assert layer_bytes(STACK, positions=10, dtype_bytes=2) == 10 * 2 * (2 * 100 + 2 * 400)
    wide = msgspec.structs.replace(STACK, inner=10)
    assert layer_bytes(wide, positions=10, dtype_bytes=2) == 10 * 2 * (2 * 100 + 3 * 100 + 100)
    scores = 4 * 100 * 100 * (2 + 2 + 4)
    assert layer_bytes(STACK, positions=100, dtype_bytes=2, attention=EAGER) == 100 * 2 * 600 + scores


def test_a_gated_mlp_has_three_tensors_of_its_inner_width() -> None:
    assert prefill_bytes(TEXT, dtype_bytes=2) == 2 * (2 * 100 + 3 * 300) + 2 * 100


def test_keys_and_values_count_for_every_layer_and_their_own_heads() -> None:
    assert kv_bytes(TEXT, dtype_bytes=2) == 2 * 3 * 2 * 25 * 2
    assert kv_bytes(TEXT, dtype_bytes=2, shards=2) == kv_bytes(TEXT, dtype_bytes=2) // 2
    assert kv_bytes(TEXT, dtype_bytes=2, shards=8) == kv_bytes(TEXT, dtype_bytes=2) // 2, "heads are not divided"


def test_tensor_parallel_divides_a_layer_but_not_its_residual() -> None:
    one, two = (encode_bytes(STACK, 100, SHAPE.picture, 2, shards=shards) for shards in (1, 2))
    residual, embeddings = 2 * 100 * 2 * 10, 5 * 100 * 2
    assert one - residual - embeddings == 2 * (two - residual - embeddings)


def rows(gpu_bytes: int = 1_000_000, **setting: Any) -> dict[tuple[str, tuple[str, ...]], Row]:
    weights = Weights(tower=100_000, language=300_000, other=1_000)
    found = plan(SHAPE, weights, Setting(gpu_bytes=gpu_bytes, num_images=1, **setting))
    return {(row.layout, row.stages): row for row in found}


def test_each_stage_holds_its_own_weights_and_the_rest_is_free() -> None:
    found = rows()
    assert {stages: row.weights for (layout, stages), row in found.items() if layout == "EPD"} == {
        ("encode",): 101_000,
        ("prefill",): 301_000,
        ("decode",): 301_000,
    }
    assert found["EP+D", ("encode", "prefill")].weights == 401_000
    assert all(row.free == 1_000_000 - row.weights for row in found.values())


def test_a_peak_is_of_the_stages_that_share_a_worker() -> None:
    found, picture = rows(), SHAPE.picture
    encode = 2 * encode_bytes(STACK, 100, picture, 2)
    prefill = (2 * 5 + 3 + 22) * prefill_bytes(TEXT, 2)
    assert found["EPD", ("encode",)].peak == encode
    assert found["EPD", ("prefill",)].peak == prefill
    assert found["EP+D", ("encode", "prefill")].peak == encode + prefill
    both = found["EP+D", ("encode", "prefill")]
    assert both.kv_left == both.free - both.peak
    assert both.kv_left_tokens == both.kv_left // kv_bytes(TEXT, 2)


def test_batches_fill_the_memory_that_kv_leaves_and_no_more() -> None:
    row = rows(kv_fraction=0.25)["EPD", ("encode",)]
    per_patch = encode_bytes(STACK, 100, SHAPE.picture, 2)
    assert row.patches == row.free // per_patch, "an encode worker keeps nothing for KV"
    both = rows(kv_fraction=0.25)["EP+D", ("encode", "prefill")]
    room = both.free - int(both.free * 0.25)
    per_patch += 5 * prefill_bytes(TEXT, 2)
    assert both.patches * per_patch <= room < (both.patches + 1) * per_patch


def test_images_are_limited_by_context_kv_or_memory_whichever_comes_first() -> None:
    assert most_images(list(rows(10**9, max_model_len=1000).values()), "EPD") == ((1000 - 32) // 13, "context")
    kv = rows(max_model_len=10**6, kv_fraction=0.05)["EPD", ("decode",)]
    assert (kv.images, kv.limit) == ((int(kv.free * 0.05) // kv_bytes(TEXT, 2) - 32) // 13, "KV")
    memory = rows(10**7, max_model_len=10**6, kv_fraction=0.9)["EP+D", ("encode", "prefill")]
    assert memory.limit == "memory"
    assert memory.images >= 1


def test_a_model_that_does_not_fit_says_so() -> None:
    found = rows(gpu_bytes=350_000)
    assert found["one piece", ("encode", "prefill", "decode")].limit == "weights"
    assert found["one piece", ("encode", "prefill", "decode")].images == 0
    assert found["EPD", ("encode",)].images > 0, "its tower does"


@pytest.mark.parametrize("claims", CLAIMS, ids=lambda claims: claims.config)
def test_the_papers_models_can_be_read_by_name(claims: Any) -> None:
    _, config = find_config(claims.config)
    shape = shape_of(config, *SIZES[-1])
    assert own_dtype(config) == "bfloat16"
    assert shape.picture.positions in (1024, 1025)
    assert shape.text.num_heads * shape.text.head_dim == shape.text.width


def test_the_built_in_model_is_found_and_has_its_published_sizes() -> None:
    name, config = find_config("builtin")
    assert (name, config) == (
        builtin.MODEL_NAME,
        json.loads((builtin.model_path() / "config.json").read_text()),
    )
    shape = shape_of(config, 256, 128)
    assert (shape.picture.num_patches, shape.picture.positions, shape.picture.tokens) == (9, 16, 4)


def test_a_model_that_is_nowhere_or_has_no_tower_or_an_unknown_rule_is_refused_with_the_reason(tmp_path: Any) -> None:
    with pytest.raises(ConfigError, match="not in the local cache"):
        find_config("nobody/nothing")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json"):
        find_config(str(tmp_path))
    with pytest.raises(ConfigError, match="no tower"):
        shape_of({"model_type": "llama"}, 100, 100)
    _, known = find_config("builtin")
    other = known | {"model_type": "something_new"}
    with pytest.raises(ConfigError, match="--tokens-per-image"):
        shape_of(other, 100, 100)
    assert shape_of(other, 100, 100, tokens_per_image=77).picture.num_tokens == 77
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        shape_of(other | {"vision_config": {"hidden_size": 8, "num_attention_heads": 2}}, 1, 1, tokens_per_image=1)


def test_a_name_is_looked_up_in_the_local_hugging_face_cache(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    folder = tmp_path / "models--someone--something"
    (folder / "snapshots" / "abc").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    (folder / "snapshots" / "abc" / "config.json").write_text('{"model_type": "made-up"}')
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert find_config("someone/something") == ("something", {"model_type": "made-up"})

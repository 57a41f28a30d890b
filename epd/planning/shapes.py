"""What a model's configuration says about sizes: its towers, its language model, its pictures. Pure.

Reads the `config.json` of the Hugging Face Hub, also of models whose code is not in transformers (MiniCPM-V,
InternVL2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from epd.config import ConfigError
from epd.planning import pictures

_QWEN_VL = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
_QWEN_MOST_PIXELS = 16384 * 28 * 28
_IDEFICS3_TILES = 4  # the longer side of a picture, in tiles: what the published processors have


class Stack(msgspec.Struct, frozen=True, kw_only=True):
    """A stack of transformer layers. `inner` is the width of the MLP; a gated one has two matrices of that width."""

    num_layers: int
    width: int
    inner: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    gated: bool


class Picture(msgspec.Struct, frozen=True, kw_only=True):
    """One item as the model sees it: patches of `positions` in the tower, and of `tokens` in the language model.

    `num_extra_tokens` are those around the patches of one item that are no embeddings.
    """

    num_patches: int
    positions: int
    tokens: int
    num_extra_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the item in the prompt."""
        return self.num_patches * self.tokens + self.num_extra_tokens


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """A model's sizes."""

    family: str
    tower: Stack
    text: Stack
    max_model_len: int
    picture: Picture


def shape_of(config: dict[str, Any], width: int, height: int, tokens_per_image: int = 0) -> Shape:
    """The sizes in a configuration, for pictures of this size.

    Args:
        config: `config.json`, as it is.
        width: of a picture, in pixels.
        height: of a picture, in pixels.
        tokens_per_image: instead of what the family's rule gives; 0: the rule.

    Raises:
        ConfigError: something is missing, or the family's pictures are not known and no tokens are given.
    """
    family = str(config.get("model_type", ""))
    try:
        tower, text = _part(config, "tower"), _part(config, "text")
        picture = _override(config, tower, tokens_per_image) if tokens_per_image else None
        rule = next((rule for names, rule in _RULES if family in names), None)
        if picture is None and rule is None:
            raise ConfigError(f"how {family or 'this model'} cuts pictures is not known here: give --tokens-per-image")
        if picture is None:
            assert rule is not None
            picture = rule(config, tower, width, height)
        return Shape(
            family=family,
            tower=_stack(tower, text=False),
            text=_stack(text, text=True),
            max_model_len=int(text.get("max_position_embeddings") or config.get("max_position_embeddings") or 0),
            picture=picture,
        )
    except KeyError as error:
        raise ConfigError(f"the configuration has no {error}") from None


def part_names(config: dict[str, Any]) -> tuple[str, str]:
    """The names of the sections of the tower and of the language model; "" where it is the configuration itself."""
    tower = next((name for name in ("vision_config", "audio_config") if isinstance(config.get(name), dict)), None)
    if tower is None:
        raise ConfigError("the configuration has neither vision_config nor audio_config: the model has no tower")
    text = next((name for name in ("text_config", "llm_config") if isinstance(config.get(name), dict)), "")
    return tower, text


def _part(config: dict[str, Any], part: str) -> dict[str, Any]:
    tower, text = part_names(config)
    name = tower if part == "tower" else text
    found = config[name] if name else config
    assert isinstance(found, dict)
    return found


def _first(section: dict[str, Any], *names: str) -> Any:
    for name in names:
        if section.get(name) is not None:
            return section[name]
    raise KeyError(" or ".join(names))


def _stack(section: dict[str, Any], *, text: bool) -> Stack:
    # Qwen2-VL calls the width of its tower embed_dim; hidden_size is that of the language model there.
    width = int(_first(section, "embed_dim", "d_model", "hidden_size") if not text else section["hidden_size"])
    heads = int(_first(section, "num_attention_heads", "num_heads", "encoder_attention_heads"))
    inner = section.get("intermediate_size") or section.get("encoder_ffn_dim")
    if inner is None:
        inner = width * float(section.get("mlp_ratio") or 4)
    return Stack(
        num_layers=int(_first(section, "num_hidden_layers", "depth", "encoder_layers")),
        width=width,
        inner=int(inner),
        num_heads=heads,
        num_kv_heads=int(section.get("num_key_value_heads") or heads),
        head_dim=int(section.get("head_dim") or width // heads),
        gated=text or "silu" in str(section.get("hidden_act", "")),
    )


def _side(section: dict[str, Any]) -> int:
    return int(section["image_size"]) // int(section["patch_size"])


def _override(config: dict[str, Any], tower: dict[str, Any], tokens: int) -> Picture:
    if tower.get("max_source_positions"):
        positions = int(tower["max_source_positions"])
    elif tower.get("image_size"):
        positions = _side(tower) ** 2
    else:
        positions = tokens * int(tower.get("spatial_merge_size") or 1) ** 2
    return Picture(num_patches=1, positions=positions, tokens=tokens)


def _minicpm(config: dict[str, Any], tower: dict[str, Any], width: int, height: int) -> Picture:
    side, patch = int(config["image_size"]), int(tower["patch_size"])
    count = pictures.minicpm_slices(width, height, side, int(config["slice_config"]["max_slice_nums"]))
    return Picture(
        num_patches=count,
        positions=(side // patch) ** 2,
        tokens=int(config["query_num"]),
        num_extra_tokens=2 * count,  # a token before and one after each
    )


def _internvl_chat(config: dict[str, Any], tower: dict[str, Any], width: int, height: int) -> Picture:
    side = int(config.get("force_image_size") or tower["image_size"])
    most, thumbnail = int(config["max_dynamic_patch"]), bool(config.get("use_thumbnail"))
    count = pictures.internvl_tiles(width, height, side, most, thumbnail)
    cells = (side // int(tower["patch_size"])) ** 2
    return Picture(
        num_patches=count,
        positions=cells + 1,
        tokens=int(cells * float(config["downsample_ratio"]) ** 2),
        num_extra_tokens=2,
    )


def _internvl(config: dict[str, Any], tower: dict[str, Any], width: int, height: int) -> Picture:
    side = tower["image_size"][0] if isinstance(tower["image_size"], list) else tower["image_size"]
    patch = tower["patch_size"][0] if isinstance(tower["patch_size"], list) else tower["patch_size"]
    cells = (int(side) // int(patch)) ** 2
    count = pictures.internvl_tiles(width, height, int(side), 12, True)
    tokens = int(cells * float(config.get("downsample_ratio", 0.5)) ** 2)
    return Picture(num_patches=count, positions=cells + 1, tokens=tokens, num_extra_tokens=2)


def _idefics3(config: dict[str, Any], tower: dict[str, Any], width: int, height: int) -> Picture:
    tile, cells = int(tower["image_size"]), _side(tower) ** 2
    count = pictures.idefics3_tiles(width, height, tile, _IDEFICS3_TILES * tile)
    return Picture(
        num_patches=count,
        positions=cells,
        tokens=cells // int(config["scale_factor"]) ** 2,
        num_extra_tokens=2 * count,
    )


def _gemma3(config: dict[str, Any], tower: dict[str, Any], _width: int, _height: int) -> Picture:
    tokens = int(config.get("mm_tokens_per_image", 256))
    return Picture(num_patches=1, positions=_side(tower) ** 2, tokens=tokens, num_extra_tokens=2)


def _llava(_config: dict[str, Any], tower: dict[str, Any], _width: int, _height: int) -> Picture:
    cells = _side(tower) ** 2
    return Picture(num_patches=1, positions=cells + 1, tokens=cells)


def _qwen_vl(_config: dict[str, Any], tower: dict[str, Any], width: int, height: int) -> Picture:
    merge, patch = int(tower.get("spatial_merge_size") or 2), int(tower.get("patch_size") or 14)
    positions = pictures.area_positions(width, height, patch, merge, _QWEN_MOST_PIXELS)
    return Picture(num_patches=1, positions=positions, tokens=positions // merge**2, num_extra_tokens=2)


def _qwen_audio(_config: dict[str, Any], tower: dict[str, Any], _width: int, _height: int) -> Picture:
    positions = int(tower["max_source_positions"])
    return Picture(num_patches=1, positions=positions, tokens=positions // 2, num_extra_tokens=2)


_RULES: tuple[tuple[tuple[str, ...], Callable[[dict[str, Any], dict[str, Any], int, int], Picture]], ...] = (
    (("minicpmv",), _minicpm),
    (("internvl_chat",), _internvl_chat),
    (("internvl",), _internvl),
    (("idefics3", "smolvlm"), _idefics3),
    (("gemma3",), _gemma3),
    (("llava",), _llava),
    (_QWEN_VL, _qwen_vl),
    (("qwen2_audio",), _qwen_audio),
)

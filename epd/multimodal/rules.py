"""How the items of each architecture are cut into pieces that can be encoded alone.

Pure. Touches vLLM's multimodal types (written against vLLM 0.32: `vllm.multimodal.inputs`).

An item is the unit unless its architecture has a rule in `RULES`. A rule is exact: the pieces encoded alone give
bit for bit the embeddings of the whole, and each piece's tokens are its own run of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFieldElem, MultiModalKwargsItem, PlaceholderRange

Rule = Callable[[MultiModalKwargsItem, PlaceholderRange], "list[Piece]"]


class UnsupportedItemError(VLLMValidationError):
    """A multimodal item that the pipeline cannot encode; HTTP 400, and the text says why."""


class Piece(msgspec.Struct, frozen=True):
    """A part of an item: the fields that the encoder sees, and the run of the prompt that its embeddings fill."""

    item: Any
    position: Any


def rule_for(config: VllmConfig) -> Rule:
    """The rule of this model's architecture."""
    from epd.multimodal.grids import temporal_grids

    for architecture in config.model_config.hf_config.architectures or []:
        if architecture in _OF_GRIDS:
            return lambda item, position: temporal_grids(item, position) or whole_item(item, position)
        if architecture in RULES:
            return RULES[architecture]
    return whole_item


def whole_item(item: MultiModalKwargsItem, position: PlaceholderRange) -> list[Piece]:
    """The item is one patch: its position and mask are kept, the encoder gets it as it is."""
    return [Piece(item, PlaceholderRange(position.offset, position.length, position.is_embed))]


def idefics3_tiles(item: MultiModalKwargsItem, position: PlaceholderRange) -> list[Piece]:
    """Idefics3 and SmolVLM: `pixel_values` is (tiles, 3, height, width), and every tile has a run of its own."""
    if "pixel_values" not in item or "num_patches" not in item:
        raise UnsupportedItemError(f"an image with the fields {sorted(item)} cannot be encoded")
    count = int(item["num_patches"].data)
    runs = _runs(position)
    rows = {len(elem.data) for name, elem in item.items() if name != "num_patches"}
    if count < 1 or rows != {count} or sum(length for _, length in runs) % count:
        raise UnsupportedItemError(f"an image of {count} tiles does not fit its {len(runs)} runs of tokens")
    per_tile = sum(length for _, length in runs) // count
    starts = [offset + k for offset, length in runs for k in range(0, length, per_tile)]
    if per_tile < 1 or len(starts) != count or any(length % per_tile for _, length in runs):
        raise UnsupportedItemError(f"the {count} tiles of an image do not have a run of tokens each")
    pieces = []
    for i, start in enumerate(starts):
        data = {
            name: elem.data * 0 + 1 if name == "num_patches" else elem.data[i : i + 1] for name, elem in item.items()
        }
        tile = MultiModalKwargsItem(
            {name: MultiModalFieldElem(data=data[name], field=elem.field) for name, elem in item.items()}
        )
        pieces.append(Piece(tile, PlaceholderRange(offset=start, length=per_tile)))
    return pieces


# Further rules go here: architecture -> how its items are cut.
RULES: dict[str, Rule] = {
    "Idefics3ForConditionalGeneration": idefics3_tiles,
    "SmolVLMForConditionalGeneration": idefics3_tiles,
}


_OF_GRIDS = {
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
}


def _runs(position: PlaceholderRange) -> list[tuple[int, int]]:
    """The (offset in the prompt, length) of each run of embedding tokens."""
    return [(first, last - first + 1) for first, last in position.extract_embeds_range()]

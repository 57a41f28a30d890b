"""How the items of a model are cut into pieces that can be encoded alone.

Pure. Touches vLLM's multimodal types (written against vLLM 0.32: `vllm.multimodal.inputs`).

`way_for` gives the way that fits a model's items: one that follows from the types of their fields, or one of
`SPECIAL`. A way is only a proposal. An encode worker tries it on its model when it starts (`epd.multimodal.proof`);
what it proves is the modality's unit, and `rule_of` cuts by a way only if its unit has been proved. Everything else
stays whole, which is always right.
"""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.multimodal.inputs import MultiModalKwargsItem, PlaceholderRange

from epd.multimodal.rules.base import Piece, Rule, UnsupportedItemError, Way, whole_item
from epd.multimodal.rules.grids import temporal_grids
from epd.multimodal.rules.leading import leading_dimension
from epd.multimodal.rules.slices import navit_slices
from epd.multimodal.units import Unit

__all__ = ["SPECIAL", "Piece", "Rule", "UnsupportedItemError", "Way", "rule_of", "way_for", "whole_item"]

_PIECES = {"image": "tile", "video": "frame", "audio": "chunk"}
_SLICES, _FRAMES = Way("slice", navit_slices), Way("frame", navit_slices)
_GRIDS = Way("temporal grid", temporal_grids)

# (architecture, modality) -> the way for items whose fields do not show it.
SPECIAL: dict[tuple[str, str], Way] = {
    ("MiniCPMO", "image"): _SLICES,
    ("MiniCPMO", "video"): _FRAMES,
    ("MiniCPMV", "image"): _SLICES,
    ("MiniCPMV", "video"): _FRAMES,
    ("MiniCPMV4_6ForConditionalGeneration", "image"): _SLICES,
    ("MiniCPMV4_6ForConditionalGeneration", "video"): _FRAMES,
    ("Qwen2VLForConditionalGeneration", "video"): _GRIDS,
    ("Qwen2_5_VLForConditionalGeneration", "video"): _GRIDS,
    ("Qwen3VLForConditionalGeneration", "video"): _GRIDS,
    ("Qwen3VLMoeForConditionalGeneration", "video"): _GRIDS,
}


def way_for(config: VllmConfig, modality: str) -> Way:
    """How this model's items of a modality may be cut, if that proves right."""
    for architecture in config.model_config.hf_config.architectures or []:
        if (architecture, modality) in SPECIAL:
            return SPECIAL[architecture, modality]
    # The windows of a sound are padded to one length, and only the last may be shorter; tiles and frames are all alike.
    return Way(_PIECES.get(modality, "piece"), leading_dimension, has_shorter_last=modality == "audio")


def rule_of(config: VllmConfig, modality: str, unit: Unit | None) -> Rule:
    """A rule that cuts by the model's way if `unit` is what that gives, else not at all.

    An item that the way cannot cut stays whole.
    """
    way = way_for(config, modality)
    if unit is None or unit.name != way.unit:
        return whole_item

    def rule(item: MultiModalKwargsItem, position: PlaceholderRange) -> list[Piece]:
        return way.cut(item, position, unit.num_tokens) or whole_item(item, position)

    return rule

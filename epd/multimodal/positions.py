"""What a prompt's positions are computed from: M-RoPE models need to know more of an item than its place.

Lives in the endpoint, which picks the fields, and in prefill and decode workers, which check them before vLLM's model
runner asserts that they exist. Pure. Touches vLLM's multimodal types (written against vLLM 0.32).

A model with M-RoPE gives each embedding a position in time, height and width. vLLM computes them from an item's grid
and times (`get_mrope_input_positions`), on every engine that runs the language model. These fields are small, and the
pixels are not among them. This module lists which ones each architecture reads. An architecture that is not listed is
refused when the endpoint starts, since nothing is known about it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec
import torch
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)

_MAX_GRID = 1 << 20
# vLLM drops the fields of items that the prefix cache covers, except those that stay on the CPU.
_FIELD = MultiModalBatchedField(keep_on_cpu=True)


class UnsupportedModelError(ValueError):
    """A model that the pipeline would get wrong; the text says why."""


class PositionsError(VLLMValidationError):
    """An item whose positions cannot be computed from what is known about it; HTTP 400, and the text says why."""


class Fields(msgspec.Struct, frozen=True):
    """The fields from which the positions of one modality's items are computed.

    `grid` is int64 (3,): temporal grids, height and width, in patches of the vision tower. `seconds`, one number, is
    the time between two temporal grids; it may be missing. `framed` items have special tokens around each temporal
    grid, for which vLLM searches the prompt.
    """

    grid: str
    seconds: str = ""
    framed: bool = False


_IMAGE = Fields("image_grid_thw")
_QWEN2 = {"image": _IMAGE, "video": Fields("video_grid_thw", "second_per_grid_ts")}
_QWEN3 = {"image": _IMAGE, "video": Fields("video_grid_thw", framed=True)}

# More architectures go here: what `get_mrope_input_positions` reads of each item
# (tests/multimodal/test_positions.py compares).
FIELDS: dict[str, dict[str, Fields]] = {
    "Qwen2VLForConditionalGeneration": _QWEN2,
    "Qwen2_5_VLForConditionalGeneration": _QWEN2,
    "Qwen3VLForConditionalGeneration": _QWEN3,
    "Qwen3VLMoeForConditionalGeneration": _QWEN3,
    "PaddleOCRVLForConditionalGeneration": {"image": _IMAGE},
}

# These have M-RoPE's tables but give tokens their plain order: nothing of an item is read.
IN_ORDER = {"MiniCPMV4_6ForConditionalGeneration"}


class Positions:
    """What prefill and decode must know of the items of one M-RoPE model.

    Args:
        fields: by modality.
        merge: how many patches of the vision tower become one embedding, in each direction.
        longest_s: a longer item would get positions for which vLLM has no rotation.
        frame: the tokens before and after each temporal grid of a `framed` item.
    """

    def __init__(
        self, fields: dict[str, Fields], merge: int, longest_s: float = math.inf, frame: tuple[int, int] = (-1, -1)
    ) -> None:
        self._fields, self._merge, self._longest_s, self._frame = fields, merge, longest_s, frame

    def pick(self, modality: str, item: MultiModalKwargsItem, place: PlaceholderRange) -> MultiModalKwargsItem:
        """The fields from which an item's positions are computed, without pixels.

        Raises:
            PositionsError: they are missing, or do not fit the item's place in the prompt.
        """
        self.check(modality, item, place)
        fields = self._fields[modality]
        names = [name for name in (fields.grid, fields.seconds) if name in item]
        return MultiModalKwargsItem({name: MultiModalFieldElem(item[name].data, _FIELD) for name in names})

    def check(self, modality: str, item: Any, place: PlaceholderRange, token_ids: Sequence[int] | None = None) -> None:
        """Checks that vLLM can compute positions from `item`, and that they fit the prompt (`token_ids`, if given).

        Raises:
            PositionsError: with what is wrong.
        """
        fields = self._fields.get(modality)
        if fields is None:
            raise PositionsError(f"this model has no positions for {modality} input")
        if item is None or fields.grid not in item:
            raise PositionsError(f"{modality} input without its grid ({fields.grid}) cannot be given positions")
        grid = item[fields.grid].data
        if not isinstance(grid, torch.Tensor) or grid.shape != (3,) or grid.is_floating_point():
            raise PositionsError(f"{fields.grid} must be three integers")
        times, height, width = map(int, grid.tolist())
        if not all(0 < size < _MAX_GRID for size in (times, height, width)) or (modality == "image" and times != 1):
            raise PositionsError(f"{fields.grid} cannot be {[times, height, width]}")
        num_embeds = int(place.get_num_embeds())
        if height % self._merge or width % self._merge or num_embeds * self._merge**2 != times * height * width:
            raise PositionsError(
                f"{modality} input of {times} x {height} x {width} patches does not fit its {num_embeds} tokens"
            )
        if fields.seconds in item:
            seconds = item[fields.seconds].data
            if not isinstance(seconds, torch.Tensor) or seconds.numel() != 1:
                raise PositionsError(f"{fields.seconds} must be one number")
            if not 0 <= times * float(seconds) <= self._longest_s:
                text = f"a video of {times} x {float(seconds)} seconds is too long: {self._longest_s:.0f} are possible"
                raise PositionsError(text)
        if fields.framed and token_ids is not None:
            self._check_frames(times, place.offset, token_ids)

    def _check_frames(self, times: int, offset: int, token_ids: Sequence[int]) -> None:
        start, end = self._frame
        ids = list(token_ids)
        try:
            for _ in range(times):
                offset = ids.index(end, ids.index(start, offset)) + 1
        except ValueError:
            raise PositionsError(f"the prompt does not have a frame of tokens for each of {times} grids") from None


def positions_for(config: VllmConfig) -> Positions | None:
    """What prefill and decode must know of this model's items; None if they need nothing (no M-RoPE).

    Raises:
        UnsupportedModelError: the model has M-RoPE, and this is not known.
    """
    model = config.model_config
    if not model.uses_mrope or not model.is_multimodal_model:
        return None
    hf = model.hf_config
    if IN_ORDER & set(hf.architectures or []):
        return None
    fields = next((FIELDS[name] for name in hf.architectures or [] if name in FIELDS), None)
    if fields is None:
        raise UnsupportedModelError(
            f"{' '.join(hf.architectures or [])} has multimodal rotary positions (M-RoPE), and what they are computed"
            f" from is only known of {', '.join(FIELDS)}"
        )
    if model.multimodal_config.is_multimodal_pruning_enabled():
        raise UnsupportedModelError(
            "video_pruning_rate: which tokens are pruned depends on the whole video, which no single worker sees"
        )
    per_second = getattr(hf.vision_config, "tokens_per_second", 1.0)
    frame = (getattr(hf, "vision_start_token_id", -1), getattr(hf, "vision_end_token_id", -1))
    longest_s = model.hf_text_config.max_position_embeddings / max(per_second, 1e-6)
    return Positions(fields, int(hf.vision_config.spatial_merge_size), longest_s, frame)

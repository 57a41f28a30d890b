"""The rule for MiniCPM-V: slices of different sizes, each with its own grid of patches and its own run of the prompt.

Pure. The processor pads the slices of an image to the longest one; the rule removes the padding, so that a slice is
the same tensor, and has the same name, whichever image it is in.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.multimodal.inputs import MultiModalKwargsItem

from epd.multimodal.rules.base import replaced


def navit_slices(item: MultiModalKwargsItem) -> list[MultiModalKwargsItem] | None:
    """Cuts `pixel_values` (slices of (3, patch, patches x patch)) as `tgt_sizes` (slices, 2) says.

    Both names may have a prefix ("video_").
    """
    sizes = next((name for name in item if name.endswith("tgt_sizes")), None)
    if sizes is None:
        return None
    pixels = sizes.removesuffix("tgt_sizes") + "pixel_values"
    grids = item[sizes].data
    if pixels not in item or len(item[pixels].data) != len(grids):
        return None
    return [
        replaced(item, {pixels: _trimmed(item[pixels].data, i, grids[i]), sizes: grids[i : i + 1]})
        for i in range(len(grids))
    ]


def _trimmed(slices: Any, index: int, grid: torch.Tensor) -> Any:
    one = slices[index]
    trimmed = one[..., : int(grid.prod()) * one.shape[-2]].contiguous()
    return trimmed.unsqueeze(0) if isinstance(slices, torch.Tensor) else [trimmed]

"""The rule for videos that consist of temporal grids: Qwen2-VL and its successors.

Pure. Touches vLLM's multimodal types (written against vLLM 0.32: `vllm.multimodal.inputs`).

Such a video's `pixel_values_videos` are the patches of one temporal grid (usually two frames) after another, and
attention in these towers stays within a grid. So each grid encoded alone gives the same embeddings as in the whole
video. An image has one temporal grid, and attention covers all of it.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.multimodal.inputs import MultiModalKwargsItem

from epd.multimodal.rules.base import replaced

GRID, PIXELS = "video_grid_thw", "pixel_values_videos"


def temporal_grids(item: MultiModalKwargsItem) -> list[MultiModalKwargsItem] | None:
    """A piece for each temporal grid, in the order of the prompt; None for an item that does not consist of grids.

    A piece keeps the other fields of the item, such as the time between grids, so that its name covers them too. Of
    fields with an entry for each grid it gets its own entry.
    """
    if GRID not in item or PIXELS not in item:
        return None
    times, height, width = map(int, item[GRID].data.tolist())
    pixels, rows = item[PIXELS].data, height * width
    if times < 1 or len(pixels) != times * rows:
        return None
    pieces = []
    for i in range(times):
        own = {GRID: torch.tensor([1, height, width]), PIXELS: pixels[i * rows : (i + 1) * rows]}
        rest = {name: _of_grid(i, times, elem.data) for name, elem in item.items() if name not in own}
        pieces.append(replaced(item, own | rest))
    return pieces


def _of_grid(index: int, times: int, data: Any) -> Any:
    """What a piece gets of a field: its own entry if there is one for each grid, else everything."""
    if isinstance(data, torch.Tensor):
        return data[index : index + 1] if times > 1 and data.shape == (times,) else data
    return data[index : index + 1] if isinstance(data, list) and len(data) == times else data

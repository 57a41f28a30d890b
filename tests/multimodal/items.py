"""Items as vLLM's processors make them, without a processor."""

from __future__ import annotations

import torch
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalFlatField,
    MultiModalKwargsItem,
    MultiModalSharedField,
    PlaceholderRange,
)

FLAT = MultiModalFlatField(slices=[])
BATCHED = MultiModalBatchedField()
SHARED = MultiModalSharedField(batch_size=1)


def item(**fields):
    """An item from (data, kind of field) by name."""
    return MultiModalKwargsItem(
        {name: MultiModalFieldElem(data=data, field=field) for name, (data, field) in fields.items()}
    )


def tiles(count, seed=0):
    """A picture of `count` tiles of 2 x 2 pixels."""
    pixels = torch.randn(count, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    return item(
        pixel_values=(pixels, FLAT), num_patches=(torch.tensor(count), BATCHED), token=(torch.tensor(7), SHARED)
    )


def place(*runs, offset=10, gap=2):
    """A place in the prompt with runs of embeddings of these lengths, `gap` tokens of text around them."""
    mask = [False] * gap
    for length in runs:
        mask += [True] * length + [False] * gap
    return PlaceholderRange(offset=offset, length=len(mask), is_embed=torch.tensor(mask))

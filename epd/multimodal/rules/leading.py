"""The rule for items that show their pieces: tensors whose leading dimension counts them, and a number that says so.

Pure. vLLM's field types say how the items of a batch are joined (0.32, `vllm.multimodal.inputs`): flat fields are
concatenated, batched ones stacked, shared ones the same for all. So the flat fields of one item can be sliced if they
all have the same length, and a batched number equal to that length counts what is in them.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalFlatField,
    MultiModalKwargsItem,
)

from epd.multimodal.rules.base import replaced


def leading_dimension(item: MultiModalKwargsItem) -> list[MultiModalKwargsItem] | None:
    """Slices flat fields, sets counts to 1, and keeps everything else for each piece."""
    flat = {name: elem for name, elem in item.items() if isinstance(elem.field, MultiModalFlatField)}
    lengths = {_length(elem) for elem in flat.values()}
    if len(lengths) != 1:
        return None
    [num_pieces] = lengths
    counts = [name for name, elem in item.items() if _is_count(elem, num_pieces)]
    if not counts:
        return None
    one = {name: item[name].data * 0 + 1 for name in counts}
    return [replaced(item, one | {name: _slice(elem, i) for name, elem in flat.items()}) for i in range(num_pieces)]


def _length(elem: MultiModalFieldElem) -> int:
    dim = elem.field.dim if isinstance(elem.data, torch.Tensor) else 0
    return int(elem.data.shape[dim]) if isinstance(elem.data, torch.Tensor) else len(elem.data)


def _slice(elem: MultiModalFieldElem, index: int) -> Any:
    if isinstance(elem.data, torch.Tensor):
        return elem.data.narrow(elem.field.dim, index, 1)
    return elem.data[index : index + 1]


def _is_count(elem: MultiModalFieldElem, value: int) -> bool:
    data = elem.data
    return (
        isinstance(elem.field, MultiModalBatchedField)
        and isinstance(data, torch.Tensor)
        and not data.is_floating_point()
        and data.numel() == 1
        and int(data) == value
    )

"""The shapes of a model's processed items, learned from items of noise: which sizes are the model's, not the medium's.

Lives in the endpoint process. Touches vLLM's multimodal types (written against vLLM 0.32). A request may choose how its
media are processed (`mm_processor_kwargs`, if it is trusted), and the encoder may not be made for the result: it would
raise, read out of bounds on a GPU, or pad what is encoded together with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.multimodal.inputs import MultiModalKwargsItem

from epd.multimodal.dummies import Dummies
from epd.multimodal.rules import UnsupportedItemError

# A tensor's sizes except the first, which counts patches, frames or samples; None for sizes that the medium decides.
Sizes = tuple[int | None, ...]


class ItemShapes:
    """The shapes of a model's items, by modality and field; derived from a few items of each modality.

    Args:
        items: items of noise in different sizes, and their modalities.
    """

    def __init__(self, items: Iterable[tuple[str, MultiModalKwargsItem]]) -> None:
        self._fields: dict[str, dict[str, Sizes]] = {}
        for modality, item in items:
            fields = self._fields.setdefault(modality, {})
            for name, sizes in _sizes(item).items():
                fields[name] = _common(fields[name], sizes) if name in fields else sizes

    @classmethod
    def of(cls, config: VllmConfig) -> ItemShapes:
        """The shapes that a model's processor produces without any options."""
        dummies = Dummies(config)
        return cls((modality, dummy.item) for modality in dummies.modalities for dummy in dummies.of(modality))

    def check(self, items: Mapping[str, Sequence[MultiModalKwargsItem | None]]) -> None:
        """Checks the items of a request.

        Raises:
            UnsupportedItemError: one has a shape that is not this model's.
        """
        for modality, each in items.items():
            for item in each:
                if item is not None and modality in self._fields:
                    _check(modality, _sizes(item), self._fields[modality])


def _check(modality: str, found: Mapping[str, Sizes], expected: Mapping[str, Sizes]) -> None:
    if found.keys() != expected.keys():
        names = ", ".join(sorted(found.keys() ^ expected.keys()))
        raise UnsupportedItemError(f"{modality} items of this model differ in: {names}")
    for name, sizes in found.items():
        if _common(expected[name], sizes) != expected[name]:
            shape = "x".join("any" if size is None else str(size) for size in expected[name])
            text = f"{name} of this {modality} is made of {'x'.join(map(str, sizes))}; the model takes {shape}"
            raise UnsupportedItemError(text)


def _sizes(item: MultiModalKwargsItem) -> dict[str, Sizes]:
    return {name: _size_of(value) for name, value in item.get_data().items()}


def _size_of(value: Any) -> Sizes:
    """The sizes that all tensors of a list have in common, as if they were one."""
    if isinstance(value, torch.Tensor):
        return tuple(value.shape[1:])
    if isinstance(value, list | tuple) and value and all(isinstance(each, torch.Tensor) for each in value):
        sizes: Sizes = tuple(value[0].shape)
        for each in value[1:]:
            sizes = _common(sizes, tuple(each.shape))
        return sizes
    return ()


def _common(one: Sizes, other: Sizes) -> Sizes:
    """The sizes that both have; None for those that differ. If the numbers of sizes differ, nothing is common."""
    if len(one) != len(other):
        return (-1,)
    return tuple(a if a == b else None for a, b in zip(one, other, strict=True))

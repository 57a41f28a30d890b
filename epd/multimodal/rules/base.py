"""What rules are made of: pieces, runs of embedding tokens, and the item that stays whole.

Pure. Touches vLLM's multimodal types (written against vLLM 0.32: `vllm.multimodal.inputs`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import torch
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import MultiModalFieldElem, MultiModalKwargsItem, PlaceholderRange

Rule = Callable[[MultiModalKwargsItem, PlaceholderRange], "list[Piece]"]


class UnsupportedItemError(VLLMValidationError):
    """A multimodal item that the pipeline cannot encode; HTTP 400, and the text says why."""


class Piece(msgspec.Struct, frozen=True):
    """A part of an item: the fields that the encoder sees, and the part of the prompt that its embeddings fill."""

    item: Any
    position: Any


class Way(msgspec.Struct, frozen=True):
    """A way to cut items that must still be proved for a model: `unit` names a piece ("tile", "frame", "chunk").

    `pieces(item)` gives the pieces in the order of the prompt, each an item for the encoder, or None for an item that
    it cannot cut. All give the same number of embeddings, except that the last may give fewer (`has_shorter_last`).
    """

    unit: str
    pieces: Callable[[MultiModalKwargsItem], list[MultiModalKwargsItem] | None]
    has_shorter_last: bool = False

    def cut(self, item: MultiModalKwargsItem, position: PlaceholderRange, num_tokens: int) -> list[Piece] | None:
        """The pieces and their places; None if the item or its place does not determine them.

        Args:
            item: the item.
            position: where the prompt has it.
            num_tokens: embeddings of a full piece, which matters only if the last may be shorter.
        """
        pieces = self.pieces(item)
        counts = shares(position, len(pieces), num_tokens if self.has_shorter_last else 0) if pieces else None
        if not pieces or counts is None:
            return None
        return [Piece(one, place) for one, place in zip(pieces, places(position, counts), strict=True)]


def whole_item(item: MultiModalKwargsItem, position: PlaceholderRange) -> list[Piece]:
    """The item as one patch: its position and mask are kept, and the encoder gets it as it is."""
    return [Piece(item, PlaceholderRange(position.offset, position.length, position.is_embed))]


def replaced(item: MultiModalKwargsItem, data: Mapping[str, Any]) -> MultiModalKwargsItem:
    """The same item with other data in some of its fields."""
    return MultiModalKwargsItem(
        {
            name: MultiModalFieldElem(data=data.get(name, elem.data), field=elem.field)
            for name, elem in item.items()
        }
    )  # fmt: skip


def shares(position: PlaceholderRange, num_pieces: int, num_tokens: int) -> list[int] | None:
    """How many embeddings each piece gives; None if the prompt does not show that.

    A run of the prompt for each piece, of whatever lengths; else pieces of `num_tokens`, of which only the last may be
    shorter; else, if that is 0, equal shares.
    """
    runs, total = position.extract_embeds_range(), int(position.get_num_embeds())
    if len(runs) == num_pieces:
        return [last - first + 1 for first, last in runs]
    if not num_tokens:
        return None if total % num_pieces or not total else [total // num_pieces] * num_pieces
    rest = total - (num_pieces - 1) * num_tokens
    return [num_tokens] * (num_pieces - 1) + [rest] if 0 < rest <= num_tokens else None


def places(position: PlaceholderRange, counts: Sequence[int]) -> list[PlaceholderRange]:
    """The parts of the prompt of consecutive pieces with these numbers of embeddings, which add up to the item's."""
    embeds = torch.cat([torch.arange(first, last + 1) for first, last in position.extract_embeds_range()])
    found = []
    for mine in embeds.split(list(counts)):
        first, length = int(mine[0]), int(mine[-1] - mine[0]) + 1
        mask = None
        if length != len(mine):
            mask = torch.zeros(length, dtype=torch.bool)
            mask[mine - first] = True
        found.append(PlaceholderRange(offset=first, length=length, is_embed=mask))
    return found

"""Training batches: a picture and many questions about it, packed into one sequence.

A mask hides the questions from each other, and their positions all start where the picture ends, so
each is learned as if it stood alone, while the picture is encoded only once.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from build import END_OF_TURN
from data import BLANK, Digits, ask, random_occupancy, random_shape, render_cells
from numpy.random import RandomState
from torch import Tensor
from transformers import Idefics3Processor, PreTrainedTokenizerFast

NO_TARGET = -100
"""In `Batch.targets`: not a token of an answer, so nothing to learn."""


@dataclass(frozen=True)
class CellBank:
    """Rendered cells, drawn once and then used over and over.

    Attributes:
        coverage: Ink coverage, uint8 of shape (n, 64, 64).
        labels: Int64 of shape (n,), from 0 to 9.
    """

    coverage: Tensor
    labels: Tensor

    @classmethod
    def render(cls, digits: Digits, num_copies: int, seed: int) -> "CellBank":
        """Draw every digit `num_copies` times, each time a little differently."""
        generator = torch.Generator().manual_seed(seed)
        coverage = torch.cat([render_cells(digits.images, generator) for _ in range(num_copies)])
        return cls(coverage, torch.as_tensor(digits.labels).repeat(num_copies))


@dataclass(frozen=True)
class Batch:
    """Pictures of one grid shape, each with its packed questions.

    Attributes:
        shape: Rows and columns of every picture.
        occupied: Bool of shape (batch, cells): whether the cell holds a digit.
        cell_indices: Int64 of shape (batch, cells): the digit's place in the bank.
        token_ids: Int64 of shape (batch, length).
        positions: Int64 of shape (batch, length).
        targets: `token_ids` where an answer is to be learned, else `NO_TARGET`.
        attention_mask: Bool of shape (batch, 1, length, length), true where a token sees another.
        spans: For each picture the (kind, start, stop) of each answer's tokens.
    """

    shape: tuple[int, int]
    occupied: Tensor
    cell_indices: Tensor
    token_ids: Tensor
    positions: Tensor
    targets: Tensor
    attention_mask: Tensor
    spans: list[list[tuple[str, int, int]]]


class Packer:
    """Turns pictures and questions into batches of tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, processor: Idefics3Processor) -> None:
        """Keep what turns text into tokens.

        Args:
            tokenizer: The model's.
            processor: Says which tokens stand for a picture of some shape.
        """
        self._tokenizer = tokenizer
        self._processor = processor
        self._known: dict[str, list[int]] = {}

    def make_batch(
        self,
        bank: CellBank,
        rng: RandomState,
        batch_size: int,
        kinds: Sequence[str],
        *,
        first_phrasing: bool = False,
    ) -> Batch:
        """Draw pictures of one random shape and ask `kinds` about each, in random order."""
        shape = random_shape(rng)
        occupied = np.stack([random_occupancy(rng, shape) for _ in range(batch_size)])
        chosen = rng.randint(len(bank.labels), size=(batch_size, *shape))
        labels = np.where(occupied, bank.labels.numpy()[chosen], BLANK)
        rows = [self._pack(shape, labels[i], kinds, rng, first_phrasing) for i in range(batch_size)]
        pad_id = self._tokenizer.pad_token_id
        segments = _pad((row.segments for row in rows), -1)
        is_visible = (segments[:, None, :] == 0) | (segments[:, :, None] == segments[:, None, :])
        is_past = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool).tril()
        return Batch(
            shape=shape,
            occupied=torch.as_tensor(occupied).flatten(1),
            cell_indices=torch.as_tensor(chosen).flatten(1),
            token_ids=_pad((row.token_ids for row in rows), pad_id),
            positions=_pad((row.positions for row in rows), 0),
            targets=_pad((row.targets for row in rows), NO_TARGET),
            attention_mask=(is_past & is_visible)[:, None],
            spans=[row.spans for row in rows],
        )

    def _pack(
        self,
        shape: tuple[int, int],
        labels: np.ndarray,
        kinds: Sequence[str],
        rng: RandomState,
        first_phrasing: bool,
    ) -> "_Row":
        rows, columns = shape
        tiles = self._processor.replace_image_token({"rows": [[rows]], "cols": [[columns]]}, 0)
        picture = self._encode("User:" + tiles)
        row = _Row(list(picture), [0] * len(picture), list(range(len(picture))), [NO_TARGET] * len(picture), [])
        for number, kind in enumerate(rng.permutation(kinds), start=1):
            qa = ask(str(kind), labels, rng, first_phrasing=first_phrasing)
            question = self._encode(f" {qa.question}{END_OF_TURN}\nAssistant:")
            answer = self._encode(f" {qa.answer}{END_OF_TURN}")
            num_tokens = len(question) + len(answer)
            stop = len(row.token_ids) + num_tokens
            row.token_ids += question + answer
            row.segments += [number] * num_tokens
            row.positions += range(len(picture), len(picture) + num_tokens)
            row.targets += [NO_TARGET] * len(question) + answer
            row.spans.append((str(kind), stop - len(answer), stop))
        return row

    def _encode(self, text: str) -> list[int]:
        if text not in self._known:
            if len(self._known) >= 50_000:
                self._known.clear()
            self._known[text] = self._tokenizer.encode(text, add_special_tokens=False)
        return self._known[text]


@dataclass
class _Row:
    """One picture's sequence; segment 0 is the picture, segment n the n-th question and answer."""

    token_ids: list[int]
    segments: list[int]
    positions: list[int]
    targets: list[int]
    spans: list[tuple[str, int, int]]


def _pad(rows: Iterable[list[int]], filler: int) -> Tensor:
    rows = list(rows)
    length = max(map(len, rows))
    return torch.tensor([row + [filler] * (length - len(row)) for row in rows])

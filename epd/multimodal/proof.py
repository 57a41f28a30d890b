"""Proves whether a model's items can be encoded in pieces: a dummy item, whole and cut, through the model itself.

Lives in an encode worker, at its start. Touches vLLM's multimodal types (written against vLLM 0.32).

A way to cut (`epd.multimodal.rules`) is proved on an item of noise if its pieces, encoded alone and encoded as one
batch, give the embeddings of the whole: bit for bit, or up to the rounding that another batch causes in the dtype. In
any other case, errors included, the unit is the item.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import msgspec
import structlog
import torch
from vllm.config import VllmConfig
from vllm.multimodal.inputs import MultiModalKwargsItem

from epd.multimodal.dummies import Dummies, Dummy
from epd.multimodal.rules import Way, way_for
from epd.multimodal.units import ITEM

log = structlog.get_logger()

# Encodes items of a modality as one batch; gives each one's embeddings, (num_tokens, width) on the CPU.
Encode = Callable[[str, Sequence[MultiModalKwargsItem]], list[torch.Tensor]]

# How far an embedding may be from that of the whole item, relative to its length: a few units in the last place.
_ULPS = 4
_FLOAT32_TOLERANCE = 1e-4
_ENOUGH_PIECES = 3
# Different content must move an embedding this many times further than cutting does; otherwise the proof is void.
_SHOWN = 8


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """The result for one modality.

    `unit` is what items are cut into, "item" if they stay whole, and `reason` says why they do. `difference`, if it was
    measured, is the largest distance of an embedding from that of the whole item, relative to its length (0.0:
    bit-equal); up to `tolerance` counts as equal. `num_tokens` lists the embeddings of each piece, or of the whole
    item; `size` is what the dummy was made from.
    """

    modality: str
    unit: str = ITEM
    num_tokens: list[int] = []
    difference: float | None = None
    tolerance: float = 0.0
    size: str = ""
    took_s: float = 0.0
    reason: str = ""

    @property
    def tokens_per_patch(self) -> int:
        """The embeddings of a full piece."""
        return max(self.num_tokens, default=0)


def prove(config: VllmConfig, encode: Encode) -> list[Proof]:
    """Tries each modality of the model; results and log say what happens, nothing is raised."""
    try:
        dummies = Dummies(config)
        modalities = dummies.modalities
    except Exception as error:
        log.warning("no dummy items: items stay whole", error=_text(error))
        return []
    proofs = []
    for modality in modalities:
        started = time.monotonic()
        try:
            proof = _prove(config, dummies, modality, encode)
        except Exception as error:  # a model that cannot be tried is served anyway
            proof = Proof(modality=modality, reason=_text(error))
        proof = msgspec.structs.replace(proof, took_s=time.monotonic() - started)
        proofs.append(proof)
        log.info(
            "unit of fan-out",
            modality=modality,
            unit=proof.unit,
            difference=proof.difference,
            tokens=proof.num_tokens,
            seconds=round(proof.took_s, 2),
            reason=proof.reason,
        )
    return proofs


def _prove(config: VllmConfig, dummies: Dummies, modality: str, encode: Encode) -> Proof:
    way = way_for(config, modality)
    dummy, pieces = _cut(dummies, modality, way)
    [whole] = encode(modality, [dummy.item])
    told = Proof(modality=modality, size=dummy.size, num_tokens=[len(whole)], tolerance=tolerance_of(whole.dtype))
    if len(pieces) < 2:
        text = "a dummy item has only one piece" if pieces else "the fields of an item do not show pieces"
        return msgspec.structs.replace(told, reason=text)
    alone = [encode(modality, [piece])[0] for piece in pieces]
    counts = [len(rows) for rows in alone]
    told = msgspec.structs.replace(told, num_tokens=counts)
    placed = way.cut(dummy.item, dummy.position, max(counts)) or []
    if [int(piece.position.get_num_embeds()) for piece in placed] != counts or sum(counts) != len(whole):
        text = f"the {way.unit}s give {counts} embeddings, the item {len(whole)}"
        return msgspec.structs.replace(told, reason=text)
    together = encode(modality, pieces)
    difference = max(distance(whole, torch.cat(alone)), distance(whole, torch.cat(together)))
    told = msgspec.structs.replace(told, difference=difference)
    if not difference <= told.tolerance:
        return msgspec.structs.replace(told, reason=f"{way.unit}s encoded alone give other embeddings")
    if not distance(*_same_length(alone[0], alone[1])) > _SHOWN * difference:
        return msgspec.structs.replace(told, reason="the embeddings hardly depend on an item's content")
    return msgspec.structs.replace(told, unit=way.unit)


def tolerance_of(dtype: torch.dtype) -> float:
    """The relative distance up to which two embeddings of a dtype count as equal."""
    return max(_ULPS * float(torch.finfo(dtype).eps), _FLOAT32_TOLERANCE)


def distance(expected: torch.Tensor, found: torch.Tensor) -> float:
    """The largest distance between the rows of two (num_tokens, width) tensors, relative to the expected row's length.

    0.0 if and only if they are bit-equal.
    """
    if torch.equal(expected, found):
        return 0.0
    rows, others = expected.double(), found.double()
    lengths = rows.norm(dim=-1)
    tiny = float(torch.finfo(torch.float32).tiny)
    lengths = lengths.clamp_min(max(float(lengths.mean()) / 100, tiny))
    return max(float(((rows - others).norm(dim=-1) / lengths).max()), tiny)


def _cut(dummies: Dummies, modality: str, way: Way) -> tuple[Dummy, list[MultiModalKwargsItem]]:
    """The smallest dummy item with enough pieces, else the one with most; no pieces if it cannot be cut."""
    best: tuple[Dummy, list[MultiModalKwargsItem]] | None = None
    for dummy in dummies.of(modality):
        pieces = way.pieces(dummy.item)
        if best is None or len(pieces or ()) > len(best[1]):
            best = dummy, pieces or []
        if pieces is None or len(pieces) >= _ENOUGH_PIECES:
            break
    assert best is not None
    return best


def _same_length(one: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    length = min(len(one), len(other))
    return one[:length], other[:length]


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]

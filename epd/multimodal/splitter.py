"""Cuts a rendered request's multimodal items into patches, by the rule of the model.

Lives in the endpoint process: rendered items in, patches out. `Splitter` owns the cuts it keeps. Touches vLLM's
multimodal types (written against vLLM 0.32: `vllm.multimodal.inputs`, `vllm.v1.serial_utils`) and no engine.
"""

from __future__ import annotations

import asyncio
from collections.abc import Container, Mapping, Sequence
from typing import Any

import msgspec
from vllm.config import VllmConfig
from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalKwargsItem, PlaceholderRange
from vllm.v1.serial_utils import MsgpackEncoder

from epd.messages import Patch
from epd.multimodal.item_identifiers import identifier_of
from epd.multimodal.naming import digest_of, identity_of, patch_hash
from epd.multimodal.positions import Positions, positions_for
from epd.multimodal.rules import Rule, UnsupportedItemError, rule_of
from epd.multimodal.units import Unit
from epd.process.bounded import ByteCache


class CutPiece(msgspec.Struct, frozen=True):
    """A piece, named and serialized: `position` is relative to the item's, `digest` names the unsalted content."""

    digest: bytes
    num_tokens: int
    position: Any
    frames: Any


class Cut(msgspec.Struct, frozen=True):
    """An item's pieces in the order of the prompt, for any request with this item; `num_bytes` are the frames'.

    `metadata` is what prefill and decode must know of the whole item, or None if each piece can be an item there.
    """

    modality: str
    pieces: list[CutPiece]
    num_bytes: int
    metadata: Any = None


class Split(msgspec.Struct, frozen=True):
    """A request's patches in the order of the prompt.

    `features` are for the engine request: one per patch, with hash and position but no data. If prefill and decode must
    know more of an item (`epd.multimodal.positions`), it is one per item, whose identifier names all its patches.
    `frames` hold each patch's encoded `MultiModalKwargsItem`, `patches[i].num_frames` of them for patch i.
    """

    patches: list[Patch]
    features: list[Any]
    frames: list[Any]

    def without(self, known: Container[str]) -> Split:
        """The same without the frames of patches that are `known`."""
        if not any(patch.patch_hash in known for patch in self.patches):
            return self
        patches, frames, start = [], [], 0
        for patch in self.patches:
            own, start = self.frames[start : start + patch.num_frames], start + patch.num_frames
            if patch.patch_hash in known:
                patch, own = msgspec.structs.replace(patch, num_frames=0), []
            patches.append(patch)
            frames += own
        return Split(patches, self.features, frames)


def cut(feature: MultiModalFeatureSpec, rule: Rule, positions: Positions | None = None) -> Cut:
    """Cuts one item by `rule`, names and serializes the pieces: the expensive part, the same for every request.

    Raises:
        UnsupportedItemError: the item has no pixels, has ready-made embeddings, or does not fit its placeholders.
        PositionsError: the item's positions cannot be computed.
    """
    place = feature.mm_position
    metadata = positions.pick(feature.modality, _checked(feature), place) if positions is not None else None
    pieces = []
    for piece in rule(_checked(feature), place):
        at = piece.position
        pieces.append(
            CutPiece(
                digest_of(piece.item),
                int(at.get_num_embeds()),
                PlaceholderRange(at.offset - place.offset, at.length, at.is_embed),
                MsgpackEncoder().encode(piece.item),
            )
        )
    num_bytes = sum(len(frame) for piece in pieces for frame in piece.frames)
    return Cut(feature.modality, pieces, num_bytes, metadata)


def assemble(features: Sequence[MultiModalFeatureSpec], cuts: Sequence[Cut], identity: bytes, salt: str) -> Split:
    """A request's patches from its items' cuts: places them in the prompt and names them with the tenant's salt."""
    patches: list[Patch] = []
    specs: list[MultiModalFeatureSpec] = []
    frames: list[Any] = []
    for feature, whole in zip(features, cuts, strict=True):
        names = [patch_hash(identity, salt, whole.modality, piece.digest) for piece in whole.pieces]
        for piece, name in zip(whole.pieces, names, strict=True):
            patches.append(
                Patch(
                    patch_hash=name,
                    modality=whole.modality,
                    num_tokens=piece.num_tokens,
                    num_frames=len(piece.frames),
                )
            )
            frames.extend(piece.frames)
        start = feature.mm_position
        if whole.metadata is not None:
            place = PlaceholderRange(start.offset, start.length, start.is_embed)
            specs.append(_spec(whole.modality, identifier_of(names), place, whole.metadata))
            continue
        for piece, name in zip(whole.pieces, names, strict=True):
            at = piece.position
            place = PlaceholderRange(start.offset + at.offset, at.length, at.is_embed)
            specs.append(_spec(whole.modality, name, place, None))
    return Split(patches, specs, frames)


def _spec(modality: str, name: str, place: PlaceholderRange, data: MultiModalKwargsItem | None) -> Any:
    return MultiModalFeatureSpec(data=data, modality=modality, identifier=name, mm_position=place, mm_hash=name)


def split(features: Sequence[MultiModalFeatureSpec], rule: Rule, identity: bytes, salt: str) -> Split:
    """Cuts each item by `rule`, names and serializes the pieces.

    Args:
        features: vLLM's features of one request, in the order of the prompt.
        rule: how an item of this model is cut (`rule_of`).
        identity: `identity_of` the deployment.
        salt: the tenant's; equal pixels with another salt get another name.

    Raises:
        UnsupportedItemError: an item has no pixels, has ready-made embeddings, or does not fit its placeholders.
    """
    return assemble(features, [cut(feature, rule) for feature in features], identity, salt)


class Splitter:
    """Splits requests, each item once: up to `max_bytes` of cuts are kept, by vLLM's hash of the item's content.

    `units` are what the encode workers have proved (modality -> unit) and may change at any time; items of other
    modalities stay whole.
    """

    def __init__(self, config: VllmConfig, max_bytes: int) -> None:
        self._config, self._identity = config, identity_of(config)
        self._positions = positions_for(config)
        self.units: Mapping[str, Unit] = {}
        self._cuts: ByteCache[tuple[Any, ...], Cut] = ByteCache(max_bytes)

    def quick(self, features: Sequence[MultiModalFeatureSpec], salt: str) -> Split | None:
        """The patches, if all items were cut before; else None."""
        cuts: list[Cut] = []
        for feature in features:
            found = self._cuts.get(_key(feature, self.units.get(feature.modality)))
            if found is None:
                return None
            cuts.append(found)
        return assemble(features, cuts, self._identity, salt)

    async def slow(self, features: Sequence[MultiModalFeatureSpec], salt: str) -> Split:
        """The patches; new items are cut in a thread.

        Raises:
            UnsupportedItemError: as for `cut`.
        """
        units = self.units
        keys = [_key(feature, units.get(feature.modality)) for feature in features]
        cuts = {key: self._cuts.get(key) for key in keys}
        for key, feature in dict(zip(keys, features, strict=True)).items():
            if cuts[key] is None:
                rule = rule_of(self._config, feature.modality, units.get(feature.modality))
                done = await asyncio.to_thread(cut, feature, rule, self._positions)
                self._cuts.put(key, done, done.num_bytes)
                cuts[key] = done
        return assemble(features, [found for key in keys if (found := cuts[key])], self._identity, salt)


def _key(feature: MultiModalFeatureSpec, unit: Unit | None) -> tuple[Any, ...]:
    return feature.modality, feature.mm_hash or feature.identifier, feature.mm_position.length, unit


def _checked(feature: MultiModalFeatureSpec) -> MultiModalKwargsItem:
    if feature.data is None:
        raise UnsupportedItemError(f"{feature.modality} input must bring its data, not only an identifier")
    if any(name.endswith("_embeds") for name in feature.data):
        raise UnsupportedItemError(f"{feature.modality} embeddings made elsewhere are not supported")
    return feature.data

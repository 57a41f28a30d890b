"""Cuts a rendered request's multimodal items into patches and names each by its content.

Lives in the endpoint process: rendered items in, patches out. `Splitter` owns the cuts it keeps. Touches vLLM's
multimodal types (written against vLLM 0.32: `vllm.multimodal.inputs`, `vllm.v1.serial_utils`) and no engine.

An item is the unit unless its architecture has a rule in `RULES`. A rule is exact: the pieces encoded alone give
bit for bit the embeddings of the whole, and each piece's tokens are its own run of the prompt.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Container, Sequence
from typing import Any

import msgspec
from blake3 import blake3
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.inputs import (
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)
from vllm.v1.serial_utils import MsgpackEncoder
from vllm.v1.utils import tensor_data

from epd.endpoint.bounded import ByteCache
from epd.messages import Patch

Rule = Callable[[MultiModalKwargsItem, PlaceholderRange], "list[Piece]"]

_HASH_CHARS = 32


class UnsupportedItemError(VLLMValidationError):
    """A multimodal item that the pipeline cannot encode; HTTP 400, and the text says why."""


class Piece(msgspec.Struct, frozen=True):
    """A part of an item: the fields that the encoder sees, and the run of the prompt that its embeddings fill."""

    item: Any
    position: Any


class CutPiece(msgspec.Struct, frozen=True):
    """A piece, named and encoded: `position` is relative to the item's, `digest` names the content without a salt."""

    digest: bytes
    num_tokens: int
    position: Any
    frames: Any


class Cut(msgspec.Struct, frozen=True):
    """An item's pieces in the order of the prompt, for any request with this item; `num_bytes` are the frames'."""

    modality: str
    pieces: list[CutPiece]
    num_bytes: int


class Split(msgspec.Struct, frozen=True):
    """A request's patches in the order of the prompt.

    `features` are for the engine request: one per patch, hash and position, no data. `frames` hold each patch's
    encoded `MultiModalKwargsItem`, `patches[i].num_frames` of them for patch i.
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


def identity_of(config: VllmConfig) -> bytes:
    """What makes the embeddings of equal pixels differ between deployments, as a digest.

    Model and revision, dtype, quantization, the whole Hugging Face configuration and the processor's settings.
    """
    model = config.model_config
    settings = {
        "model": model.model,
        "revision": model.revision,
        "code_revision": model.code_revision,
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "hf_config": model.hf_config.to_dict(),
        "mm_processor_kwargs": getattr(model.multimodal_config, "mm_processor_kwargs", None),
    }
    return bytes(blake3(json.dumps(settings, sort_keys=True, default=str).encode()).digest())


def patch_hash(identity: bytes, salt: str, modality: str, digest: bytes) -> str:
    """Names what the encoder would see: 32 hex digits, equal for equal input and salt."""
    hasher = blake3(identity)
    _update(hasher, salt.encode())
    _update(hasher, modality.encode())
    _update(hasher, digest)
    return str(hasher.hexdigest()[:_HASH_CHARS])


def digest_of(item: MultiModalKwargsItem) -> bytes:
    """Names the content of an item: every field the encoder sees."""
    hasher = blake3()
    for name in sorted(item):
        _update(hasher, name.encode())
        _update_data(hasher, item[name].data)
    return bytes(hasher.digest())


def cut(feature: MultiModalFeatureSpec, rule: Rule) -> Cut:
    """Cuts one item by `rule`, names and encodes the pieces: the expensive part, the same for every request.

    Raises:
        UnsupportedItemError: an item without pixels, with ready embeddings, or that does not fit its placeholders.
    """
    place = feature.mm_position
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
    return Cut(feature.modality, pieces, sum(len(frame) for piece in pieces for frame in piece.frames))


def assemble(features: Sequence[MultiModalFeatureSpec], cuts: Sequence[Cut], identity: bytes, salt: str) -> Split:
    """A request's patches from its items' cuts: places them in the prompt and names them with the tenant's salt."""
    patches: list[Patch] = []
    specs: list[MultiModalFeatureSpec] = []
    frames: list[Any] = []
    for feature, whole in zip(features, cuts, strict=True):
        for piece in whole.pieces:
            name = patch_hash(identity, salt, whole.modality, piece.digest)
            at = piece.position
            place = PlaceholderRange(feature.mm_position.offset + at.offset, at.length, at.is_embed)
            patches.append(
                Patch(
                    patch_hash=name,
                    modality=whole.modality,
                    num_tokens=piece.num_tokens,
                    num_frames=len(piece.frames),
                )
            )
            specs.append(
                MultiModalFeatureSpec(
                    data=None, modality=whole.modality, identifier=name, mm_position=place, mm_hash=name
                )
            )
            frames.extend(piece.frames)
    return Split(patches, specs, frames)


def split(features: Sequence[MultiModalFeatureSpec], rule: Rule, identity: bytes, salt: str) -> Split:
    """Cuts each item by `rule`, names and encodes the pieces.

    Args:
        features: vLLM's features of one request, in the order of the prompt.
        rule: how an item of this model is cut (`rule_for`).
        identity: `identity_of` the deployment.
        salt: the tenant's; equal pixels under another salt get another name.

    Raises:
        UnsupportedItemError: an item without pixels, with ready embeddings, or that does not fit its placeholders.
    """
    return assemble(features, [cut(feature, rule) for feature in features], identity, salt)


class Splitter:
    """Splits requests, each item once: cuts are kept, `max_bytes` of them, by vLLM's hash of the item's content."""

    def __init__(self, config: VllmConfig, max_bytes: int) -> None:
        self._identity, self._rule = identity_of(config), rule_for(config)
        self._cuts: ByteCache[tuple[Any, ...], Cut] = ByteCache(max_bytes)

    def quick(self, features: Sequence[MultiModalFeatureSpec], salt: str) -> Split | None:
        """The patches, where all items were cut before; else None."""
        cuts: list[Cut] = []
        for feature in features:
            found = self._cuts.get(_key(feature))
            if found is None:
                return None
            cuts.append(found)
        return assemble(features, cuts, self._identity, salt)

    async def slow(self, features: Sequence[MultiModalFeatureSpec], salt: str) -> Split:
        """The patches; items that are new are cut in a thread.

        Raises:
            UnsupportedItemError: as `cut`.
        """
        cuts = {key: self._cuts.get(key) for key in map(_key, features)}
        for key, feature in {_key(each): each for each in features}.items():
            if cuts[key] is None:
                done = await asyncio.to_thread(cut, feature, self._rule)
                self._cuts.put(key, done, done.num_bytes)
                cuts[key] = done
        return assemble(features, [found for key in map(_key, features) if (found := cuts[key])], self._identity, salt)


def rule_for(config: VllmConfig) -> Rule:
    """The rule of this model's architecture."""
    for architecture in config.model_config.hf_config.architectures or []:
        if architecture in RULES:
            return RULES[architecture]
    return whole_item


def whole_item(item: MultiModalKwargsItem, position: PlaceholderRange) -> list[Piece]:
    """The item is one patch: its position and mask are kept, the encoder gets it as it is."""
    return [Piece(item, PlaceholderRange(position.offset, position.length, position.is_embed))]


def idefics3_tiles(item: MultiModalKwargsItem, position: PlaceholderRange) -> list[Piece]:
    """Idefics3 and SmolVLM: `pixel_values` is (tiles, 3, height, width), and every tile has a run of its own."""
    if "pixel_values" not in item or "num_patches" not in item:
        raise UnsupportedItemError(f"an image with the fields {sorted(item)} cannot be encoded")
    count = int(item["num_patches"].data)
    runs = _runs(position)
    rows = {len(elem.data) for name, elem in item.items() if name != "num_patches"}
    if count < 1 or rows != {count} or sum(length for _, length in runs) % count:
        raise UnsupportedItemError(f"an image of {count} tiles does not fit its {len(runs)} runs of tokens")
    per_tile = sum(length for _, length in runs) // count
    starts = [offset + k for offset, length in runs for k in range(0, length, per_tile)]
    if per_tile < 1 or len(starts) != count or any(length % per_tile for _, length in runs):
        raise UnsupportedItemError(f"the {count} tiles of an image do not have a run of tokens each")
    pieces = []
    for i, start in enumerate(starts):
        data = {
            name: elem.data * 0 + 1 if name == "num_patches" else elem.data[i : i + 1] for name, elem in item.items()
        }
        tile = MultiModalKwargsItem(
            {name: MultiModalFieldElem(data=data[name], field=elem.field) for name, elem in item.items()}
        )
        pieces.append(Piece(tile, PlaceholderRange(offset=start, length=per_tile)))
    return pieces


# Further rules go here: architecture -> how its items are cut.
RULES: dict[str, Rule] = {
    "Idefics3ForConditionalGeneration": idefics3_tiles,
    "SmolVLMForConditionalGeneration": idefics3_tiles,
}


def _key(feature: MultiModalFeatureSpec) -> tuple[Any, ...]:
    return feature.modality, feature.mm_hash or feature.identifier, feature.mm_position.length


def _runs(position: PlaceholderRange) -> list[tuple[int, int]]:
    """The (offset in the prompt, length) of each run of embedding tokens."""
    return [(first, last - first + 1) for first, last in position.extract_embeds_range()]


def _checked(feature: MultiModalFeatureSpec) -> MultiModalKwargsItem:
    if feature.data is None:
        raise UnsupportedItemError(f"{feature.modality} input must bring its data, not only an identifier")
    if any(name.endswith("_embeds") for name in feature.data):
        raise UnsupportedItemError(f"{feature.modality} embeddings made elsewhere are not supported")
    return feature.data


def _update(hasher: Any, part: bytes) -> None:
    hasher.update(len(part).to_bytes(8, "little"))
    hasher.update(part)


def _update_data(hasher: Any, data: Any) -> None:
    if isinstance(data, (list, tuple)):
        _update(hasher, f"list {len(data)}".encode())
        for part in data:
            _update_data(hasher, part)
    elif hasattr(data, "dtype"):
        _update(hasher, f"{data.dtype} {tuple(data.shape)}".encode())
        hasher.update(memoryview(tensor_data(data)))
    else:
        _update(hasher, f"{type(data).__name__} {data!r}".encode())

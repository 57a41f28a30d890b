"""Cuts a rendered request's multimodal items into patches and names each by its content.

Lives in the endpoint process; pure: rendered items in, patches out. Touches vLLM's multimodal types (written against
vLLM 0.32: `vllm.multimodal.inputs`, `vllm.v1.serial_utils`) and no engine.

An item is the unit unless its architecture has a rule in `RULES`. A rule is exact: the pieces encoded alone give
bit for bit the embeddings of the whole, and each piece's tokens are its own run of the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
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

from epd.messages import Patch

Rule = Callable[[MultiModalKwargsItem, PlaceholderRange], "list[Piece]"]

_HASH_CHARS = 32


class UnsupportedItemError(VLLMValidationError):
    """A multimodal item that the pipeline cannot encode; HTTP 400, and the text says why."""


class Piece(msgspec.Struct, frozen=True):
    """A part of an item: the fields that the encoder sees, and the run of the prompt that its embeddings fill."""

    item: Any
    position: Any


class Split(msgspec.Struct, frozen=True):
    """A request's patches in the order of the prompt.

    `features` are for the engine request: one per patch, hash and position, no data. `frames` hold each patch's
    encoded `MultiModalKwargsItem`, `patches[i].num_frames` of them for patch i.
    """

    patches: list[Patch]
    features: list[Any]
    frames: list[Any]


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


def patch_hash(identity: bytes, salt: str, modality: str, item: MultiModalKwargsItem) -> str:
    """Names what the encoder would see: 32 hex digits, equal for equal input and salt."""
    hasher = blake3(identity)
    _update(hasher, salt.encode())
    _update(hasher, modality.encode())
    for name in sorted(item):
        _update(hasher, name.encode())
        _update_data(hasher, item[name].data)
    return str(hasher.hexdigest()[:_HASH_CHARS])


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
    patches: list[Patch] = []
    specs: list[MultiModalFeatureSpec] = []
    frames: list[Any] = []
    for feature in features:
        for piece in rule(_checked(feature), feature.mm_position):
            name = patch_hash(identity, salt, feature.modality, piece.item)
            encoded = MsgpackEncoder().encode(piece.item)
            num_tokens = int(piece.position.get_num_embeds())
            patches.append(
                Patch(
                    patch_hash=name,
                    modality=feature.modality,
                    num_tokens=num_tokens,
                    num_frames=len(encoded),
                )
            )
            specs.append(
                MultiModalFeatureSpec(
                    data=None,
                    modality=feature.modality,
                    identifier=name,
                    mm_position=piece.position,
                    mm_hash=name,
                )
            )
            frames.extend(encoded)
    return Split(patches, specs, frames)


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

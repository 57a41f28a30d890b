"""Names patches by their content: equal names mean equal embeddings.

Pure. Touches vLLM's multimodal types (written against vLLM 0.32).
"""

from __future__ import annotations

import json
from typing import Any

from blake3 import blake3
from vllm.config import VllmConfig
from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.v1.utils import tensor_data

_HASH_CHARS = 32


def identity_of(config: VllmConfig) -> bytes:
    """A digest of what makes the embeddings of equal pixels differ between deployments.

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
    """The name of what the encoder would see: 32 hex digits, equal for equal input and salt."""
    hasher = blake3(identity)
    _update(hasher, salt.encode())
    _update(hasher, modality.encode())
    _update(hasher, digest)
    return str(hasher.hexdigest()[:_HASH_CHARS])


def digest_of(item: MultiModalKwargsItem) -> bytes:
    """The name of an item's content: of every field that the encoder sees."""
    hasher = blake3()
    for name in sorted(item):
        _update(hasher, name.encode())
        _update_data(hasher, item[name].data)
    return bytes(hasher.digest())


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

"""Proves, on an encode worker's engine, what kind of piece its modalities can be cut into. Touches vLLM (0.32).

Lives in an encode worker; called at start. It does beside the model what vLLM's model runner does with the items of a
step, without the scheduler: a dummy item needs no slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from vllm.forward_context import set_forward_context
from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.multimodal.utils import group_and_batch_mm_kwargs

from epd.messages import WorkerInfo
from epd.multimodal.proof import Proof, prove

if TYPE_CHECKING:
    from workers.engine import Engine


def prove_units(engine: Engine) -> list[Proof]:
    """The unit of each modality: what its items can be cut into."""

    def encode(modality: str, items: Sequence[MultiModalKwargsItem]) -> list[torch.Tensor]:
        return list(engine.core.collective_rpc(_encode, args=(modality, list(items)))[0])

    return prove(engine.vllm_config, encode)


def with_units(info: WorkerInfo, proofs: Sequence[Proof]) -> WorkerInfo:
    """What the worker tells the broker, with the proved units."""
    return msgspec.structs.replace(
        info,
        units={proof.modality: proof.unit for proof in proofs},
        tokens_per_patch={proof.modality: proof.tokens_per_patch for proof in proofs},
    )


def _encode(worker: Any, modality: str, items: list[MultiModalKwargsItem]) -> list[torch.Tensor]:
    """Runs beside the model: each item's embeddings, (num_tokens, width) on the CPU."""
    runner, embeddings = worker.model_runner, []
    model = runner.get_model()
    with torch.inference_mode(), set_forward_context(None, worker.vllm_config):
        named = [(modality, item) for item in items]
        for _, _, batch in group_and_batch_mm_kwargs(named, device=runner.device):
            embeddings += list(model.embed_multimodal(**batch))
        return [one.reshape(-1, one.shape[-1]).cpu() for one in embeddings]

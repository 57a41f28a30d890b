"""Finds out whether the pipeline serves a model and what its items can be cut into, by building an encode engine.

Lives in whatever process calls it, which holds the engine until it ends; set vLLM's environment first
(`epd.local.environment`).
"""

from __future__ import annotations

import time
from typing import Any

import msgspec

from epd.config import Config
from epd.errors import one_line
from epd.messages import Stage


class Modality(msgspec.Struct, frozen=True, kw_only=True):
    """What an encode worker has proved for one modality; see `epd.multimodal.proof.Proof`."""

    modality: str
    unit: str
    num_pieces: int
    difference: float | None
    tolerance: float
    tokens_per_patch: int
    dummy: str
    seconds: float
    reason: str = ""


class Examination(msgspec.Struct, frozen=True, kw_only=True):
    """What was found; `refused` says why if the pipeline does not serve the model."""

    model: str
    architecture: str = ""
    refused: str = ""
    modalities: list[Modality] = []
    seconds: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """For `json.dumps`."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found


def examine(config: Config) -> Examination:
    """Builds an encode engine of `config` and proves what it can; the result says what goes wrong.

    An encode worker may be able to cut the items of a model that the endpoint refuses.
    """
    from epd.endpoint.http.options import serve_args, vllm_config_of

    started = time.monotonic()
    refused, proofs = "", []
    architectures: list[str] = []
    try:
        model = vllm_config_of(serve_args(config)).model_config
        architectures = model.hf_config.architectures or []
        if not model.is_multimodal_model:
            refused = "it takes text only, which needs no encode worker"
    except Exception as error:  # vLLM refuses models with exceptions of many kinds
        refused = one_line(error)
    try:
        from workers.engine import Engine
        from workers.proving import prove_units

        engine = Engine(config, Stage.ENCODE, "check")
        architectures = engine.vllm_config.model_config.hf_config.architectures or []
        proofs = prove_units(engine)
    except Exception as error:
        refused = refused or one_line(error)
    modalities = [
        Modality(
            modality=proof.modality,
            unit=proof.unit,
            num_pieces=len(proof.num_tokens),
            difference=proof.difference,
            tolerance=proof.tolerance,
            tokens_per_patch=proof.tokens_per_patch,
            dummy=proof.size,
            seconds=round(proof.took_s, 3),
            reason=proof.reason,
        )
        for proof in proofs
    ]
    return Examination(
        model=config.model,
        architecture=", ".join(architectures),
        refused=refused,
        modalities=modalities,
        seconds=round(time.monotonic() - started, 2),
    )

"""Models whose language model has a recurrent state beside, or instead of, attention KV: what they cannot be asked for.

Lives in the endpoint and in decode workers. Pure. Written against vLLM 0.32.

The state of such a layer stands for all tokens so far and cannot be taken back by one. Decode computes the last token
of a prompt itself, so the state that reaches it must be the one before that token: vLLM's NIXL connector has prefill
leave the last token out. Whatever makes prefill go further than decode expects gives another answer without an error.
"""

from __future__ import annotations

from vllm.config import VllmConfig


def has_recurrent_state(config: VllmConfig) -> bool:
    """Whether the model has layers with a recurrent state (Mamba, linear attention, short convolutions)."""
    model = config.model_config
    return bool(model.has_inner_state or model.is_hybrid)

"""Models whose language model has a recurrent state besides or instead of attention KV: what they do not support.

Lives in the endpoint and in decode workers. Pure. Written against vLLM 0.32.

The state of such a layer stands for all tokens so far and cannot go back by one. Decode computes the last token of a
prompt itself, so it must receive the state before that token: vLLM's NIXL connector makes prefill leave out the last
token. Whatever makes prefill go further than decode expects silently gives a different answer.
"""

from __future__ import annotations

from vllm.config import VllmConfig


def has_recurrent_state(config: VllmConfig) -> bool:
    """Whether the model has layers with a recurrent state (Mamba, linear attention, short convolutions)."""
    model = config.model_config
    return bool(model.has_inner_state or model.is_hybrid)

"""Whether a request that has given tokens can go on elsewhere as if nothing had happened.

Lives in the endpoint process; pure. To go on means: prompt and tokens so far become the prompt of a new request, with
`max_tokens` and `min_tokens` reduced by what was given. That is right if the sampler looks at the sequence as a whole,
or only at its next position; it is wrong if it looks at the output alone, counts positions, or keeps state between
steps. Written against vLLM 0.32 (`vllm.sampling_params`, `vllm.v1.sample`, `vllm.v1.core.sched.utils`).
"""

from __future__ import annotations

from typing import Final

from vllm.sampling_params import SamplingParams, SamplingType

# Parameters on which the next token's distribution does not depend, or not on where prompt and output meet.
# Stop strings, text and log-probabilities are made in the endpoint, which goes on; a repetition penalty counts prompt
# and output alike (`apply_repetition_penalties`); whoever goes on reduces `min_tokens` and `max_tokens`.
HARMLESS: Final = frozenset(
    {
        "repetition_penalty",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "max_tokens",
        "min_tokens",
        "logprobs",
        "prompt_logprobs",
        "prompt_logprob_start",
        "logprob_token_ids",
        "flat_logprobs",
        "detokenize",
        "skip_special_tokens",
        "spaces_between_special_tokens",
        "include_stop_str_in_output",
        "output_kind",
        "stream_interval",
        "skip_clone",
        "output_text_buffer_length",
        "_eos_token_id",
        "_all_stop_token_ids",
        "_watermarking_skipped",
        "logit_bias",
        "allowed_token_ids",
        "skip_reading_prefix_cache",
    }
)
# Harmless with this value only. Presence and frequency penalties and bad words look at the output alone, a grammar and
# a thinking budget keep state, repetition detection and traces count output positions, a watermark hashes its context,
# rows of prompt log-probabilities and of expert routing must fit the prompt, and nobody knows what plug-ins do with
# `extra_args`. With n > 1 each choice is a separate request with n = 1.
ONLY: Final[dict[str, tuple[object, ...]]] = {
    "n": (1,),
    "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,),
    "watermarking": (None, False),
    "structured_outputs": (None,),
    "extra_args": (None, {}),
    "bad_words": (None, []),
    "_bad_words_token_ids": (None, []),
    "thinking_token_budget": (None,),
    "repetition_detection": (None,),
    "routed_experts_prompt_start": (0,),
    "trace_decode_token_ids": (None, []),
}
# Engine options that change what is sampled: prefill workers sample first tokens only if these are the same for both.
SAMPLER_OPTIONS: Final = ("logits_processors", "logprobs_mode", "max_logprobs")
# Decided below: a seed gives a sequence of random numbers, some of which are used up; greedy sampling uses none. The
# rows of `prompt_logprob_token_ids` are an array and must fit the prompt.
DECIDED: Final = frozenset({"seed", "prompt_logprob_token_ids"})


def resumable(params: SamplingParams) -> bool:
    """Whether going on from prompt and tokens gives the same as an undisturbed run.

    For greedy sampling that means the same tokens, for unseeded random sampling the same distribution.
    """
    if params.seed is not None and params.sampling_type != SamplingType.GREEDY:
        return False
    if params.prompt_logprob_token_ids is not None:
        return False
    return all(getattr(params, name) in values for name, values in ONLY.items())

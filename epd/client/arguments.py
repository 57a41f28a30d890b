"""The arguments of ``generate`` and ``stream``: which there are, and errors for unknown ones.

Lives in the user's process; pure.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from epd.client.clips import Clip
from epd.client.pictures import Picture

__all__ = ["OF_THE_CLIENT", "Arguments", "check_extra_body", "check_names"]


class Arguments(TypedDict, total=False):
    """What ``generate`` and ``stream`` take besides the prompt. None means the same as leaving it out.

    The second half are fields of vLLM's chat request, sent as they are. A test compares them with vLLM's.
    """

    images: Picture | Iterable[Picture] | None
    videos: Clip | Iterable[Clip] | None
    audios: Clip | Iterable[Clip] | None
    system: str | None
    messages: Iterable[Mapping[str, Any]] | None
    logprobs: bool | int | None
    extra_body: Mapping[str, Any] | None

    model: str | None
    max_tokens: int | None
    max_completion_tokens: int | None
    min_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop_str_in_output: bool | None
    ignore_eos: bool | None
    n: int | None
    use_beam_search: bool | None
    length_penalty: float | None
    frequency_penalty: float | None
    presence_penalty: float | None
    repetition_penalty: float | None
    repetition_detection: Mapping[str, Any] | None
    logit_bias: Mapping[str, float] | None
    allowed_token_ids: Sequence[int] | None
    bad_words: Sequence[str] | None
    watermarking: bool | None
    top_logprobs: int | None
    prompt_logprobs: int | None
    logprob_token_ids: Sequence[int] | None
    return_tokens_as_token_ids: bool | None
    return_token_ids: bool | None
    return_token_offsets: bool | None
    return_prompt_text: bool | None
    skip_special_tokens: bool | None
    spaces_between_special_tokens: bool | None
    truncate_prompt_tokens: int | None
    truncation_side: str | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | Mapping[str, Any] | None
    parallel_tool_calls: bool | None
    response_format: Mapping[str, Any] | None
    structured_outputs: Mapping[str, Any] | None
    reasoning_effort: str | None
    thinking_token_budget: int | None
    include_reasoning: bool | None
    echo: bool | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    add_special_tokens: bool | None
    documents: Sequence[Mapping[str, str]] | None
    chat_template: str | None
    chat_template_kwargs: Mapping[str, Any] | None
    media_io_kwargs: Mapping[str, Mapping[str, Any]] | None
    mm_processor_kwargs: Mapping[str, Any] | None
    mm_payload: str | None
    return_mm_kwargs: bool | None
    routed_experts_prompt_start: int | None
    stream_options: Mapping[str, Any] | None
    stream_interval: int | None
    priority: int | None
    request_id: str | None
    session_id: str | None
    user: str | None
    cache_salt: str | None
    kv_transfer_params: Mapping[str, Any] | None
    ec_transfer_params: Mapping[str, Any] | None
    vllm_xargs: Mapping[str, Any] | None


OF_THE_CLIENT = frozenset({"images", "videos", "audios", "system", "messages", "logprobs", "extra_body"})
"""The arguments that are not sent unchanged."""

_KNOWN = list(Arguments.__annotations__)
_MEANT = {
    "picture": "images",
    "pictures": "images",
    "sound": "audios",
    "sounds": "audios",
    "max_new_tokens": "max_tokens",
}
_NEVER_EXTRA = OF_THE_CLIENT - {"logprobs"} | {"prompt", "stream"}


def check_names(names: Iterable[str]) -> None:
    """Refuse unknown arguments: they would change the answer, or the caller would think so.

    Raises:
        TypeError: There is one; names the nearest known one.
    """
    for name in names:
        if name in Arguments.__annotations__:
            continue
        if name == "stream":
            raise TypeError("there is no argument 'stream': call the method stream() instead of generate()")
        near = [_MEANT[name]] if name in _MEANT else difflib.get_close_matches(name, _KNOWN, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise TypeError(f"there is no argument {name!r}: {hint}What only the server knows goes into extra_body={{...}}")


def check_extra_body(extra: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Refuse fields that would be dropped, or that contradict an argument.

    Args:
        extra: Additional fields of the body.
        options: The fields that are already there.

    Raises:
        TypeError: There is one, or ``extra`` is not a mapping.
    """
    if not isinstance(extra, Mapping):
        raise TypeError(f"extra_body must be a mapping of additional fields of the body, not {type(extra).__name__}")
    for name in extra:
        if name in _NEVER_EXTRA:
            raise TypeError(f"extra_body cannot have {name!r}: it is not a field of the body, or belongs to the client")
        if name in options:
            raise TypeError(f"{name!r} is given twice, as an argument and in extra_body")

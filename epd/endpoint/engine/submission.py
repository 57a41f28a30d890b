"""From vLLM's engine request to SUBMIT: what is refused, and the frames that are sent.

Lives in the endpoint process; pure. A part of the engine client, written against vLLM 0.32 (`vllm.v1.engine`).
"""

from __future__ import annotations

from array import array
from copy import copy
from http import HTTPStatus
from typing import Any

from blake3 import blake3
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.serial_utils import MsgpackEncoder

from epd.endpoint.http.failures import Failure
from epd.messages import Submit
from epd.multimodal.splitter import Split
from epd.transport import wire

# vLLM's convolution on a CPU ends the engine if a prompt begins with a step of one token.
_MIN_RECURRENT_TOKENS = 3
_PREFIX_TOKENS, _MAX_PREFIXES = 256, 32
_FORBIDDEN_EXTRA_ARGS = ("kv_transfer_params", "ec_transfer_params")


class PipelineError(GracefulHTTPError):
    """A request that the pipeline refused or could not finish; carries the HTTP status for the client."""

    def __init__(self, failure: Failure) -> None:
        # Python does not know the status 499; `ExplicitErrors`, which has the last word, does.
        known = failure.status in HTTPStatus.__members__.values()
        status = HTTPStatus(failure.status) if known else HTTPStatus.BAD_REQUEST
        super().__init__(f"{failure.code}: {failure.message}", status)
        self.failure = failure


def check_request(request: EngineCoreRequest, recurrent: bool = False) -> None:
    """Refuses requests that the pipeline would get wrong.

    Args:
        request: the request.
        recurrent: whether the model has a recurrent state (`epd.multimodal.recurrent`).

    Raises:
        VLLMValidationError: with the reason; HTTP 400.
    """
    params = request.sampling_params
    if params is None:
        raise VLLMValidationError("pooling requests are not supported")
    if request.prompt_embeds is not None or request.prompt_token_ids is None:
        raise VLLMValidationError("prompt_embeds are not supported")
    if request.resumable:
        raise VLLMValidationError("streaming input is not supported")
    for name in _FORBIDDEN_EXTRA_ARGS:
        if (params.extra_args or {}).get(name):
            raise VLLMValidationError(f"{name} are set by the pipeline, not by clients", parameter=name)
    if recurrent:
        _check_recurrent(request)
    # The last token's logits give the first output: they must come from a token, not from an embedding that
    # may still be under way.
    last = len(request.prompt_token_ids) - 1
    for feature in request.mm_features or ():
        if feature.mm_position.offset <= last < feature.mm_position.offset + feature.mm_position.length:
            raise VLLMValidationError("the prompt must not end inside a multimodal item; add text after it")


def _check_recurrent(request: EngineCoreRequest) -> None:
    """Refuses what does not go with a prefill that leaves out the last token (`epd.multimodal.recurrent`)."""
    if wants_prompt_logprobs(request):
        # Then vLLM's connector does not leave it out.
        raise VLLMValidationError(
            "prompt_logprobs are not supported with this model: it has a recurrent state, which decode needs"
            " as it is before the prompt's last token",
            parameter="prompt_logprobs",
        )
    if len(request.prompt_token_ids or ()) < _MIN_RECURRENT_TOKENS:
        raise VLLMValidationError(
            f"this model has a recurrent state and needs a prompt of at least {_MIN_RECURRENT_TOKENS} tokens"
        )


def without_pixels(request: EngineCoreRequest, parts: Split) -> EngineCoreRequest:
    """The engine request as workers get it: its items are its patches, by name and place only."""
    sent = copy(request)
    sent.mm_features = parts.features or None
    sent.data_parallel_rank = None  # a choice among this process's engines, of which there are none
    return sent


def submission(request: EngineCoreRequest, parts: Split, **fields: Any) -> tuple[Submit, list[Any]]:
    """The message and its opaque frames: the engine request, which is without pixels, then each patch's.

    `fields` are SUBMIT's others. A request that goes on is not asked for the log-probabilities of its prompt again.
    """
    params = request.sampling_params
    assert params is not None and request.prompt_token_ids is not None
    if fields.get("output_token_ids") and wants_prompt_logprobs(request):
        request = copy(request)
        request.sampling_params = copy(params)
        request.sampling_params.prompt_logprobs = request.sampling_params.prompt_logprob_token_ids = None
    engine_frames = MsgpackEncoder().encode(request)
    submit = Submit(
        request_id=request.request_id,
        num_prompt_tokens=len(request.prompt_token_ids),
        max_tokens=params.max_tokens,
        num_engine_frames=len(engine_frames),
        patches=parts.patches,
        **fields,
    )
    return submit, [*engine_frames, *parts.frames]


def prefix_hashes(request: EngineCoreRequest) -> list[str]:
    """Names of the beginnings of a prompt, from short to long, in steps of `_PREFIX_TOKENS` tokens.

    The same beginning has the same name, unless its adapter or cache salt is another: then its KV is, too. Only a hint
    where to prefill: of items, their places are named but not what they are (their patches say that).
    """
    tokens = array("I", request.prompt_token_ids or ()).tobytes()
    step = _PREFIX_TOKENS * array("I").itemsize
    digest = blake3(f"{request.cache_salt or ''}/{request.lora_request and request.lora_request.lora_name}".encode())
    names = []
    for end in range(step, min(len(tokens), _MAX_PREFIXES * step) + 1, step):
        digest.update(tokens[end - step : end])
        names.append(digest.hexdigest(length=8))
    return names


def too_large(frames: list[Any]) -> str:
    """Why these frames do not fit into one message, or nothing: the broker would drop such a message."""
    num_bytes = sum(map(len, frames))
    if len(frames) + 2 <= wire.MAX_FRAMES and num_bytes <= wire.MAX_MESSAGE_BYTES:
        return ""
    return f"the request has {num_bytes} bytes in {len(frames)} frames; it must be split into several requests"


def wants_prompt_logprobs(request: EngineCoreRequest) -> bool:
    """Whether the prefill worker will send log-probabilities of the prompt; its first token has none."""
    params = request.sampling_params
    if params is None or len(request.prompt_token_ids or ()) < 2:
        return False
    return params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None

"""Messages between endpoint and broker about a request, from its submission to its end. Pure."""

from __future__ import annotations

import msgspec

from epd.messages.parts import Patch, StoryEvent, Struct


class Submit(Struct, frozen=True):
    """Endpoint → Broker: a rendered request.

    Opaque frames: first `num_engine_frames` with the engine request, then each patch's in the order of `patches`.
    `max_tokens` bounds the output; `deadline_s` is how long from now the whole request may take. `tenant` says whose it
    is, for fairness. A request that was begun before (the broker was lost) comes with the number of `attempts` so far,
    and with `output_token_ids`, the tokens that its client has: it continues after them. `resumable` says that going on
    from prompt and tokens gives the same as an undisturbed run, `prefill_samples` that the prefill worker is to sample
    the first token. `prefix_hashes` name the beginnings of the prompt, from short to long, so that a request can go
    where the beginning of its prompt was prefilled before.
    """

    request_id: str
    num_prompt_tokens: int
    max_tokens: int
    num_engine_frames: int
    patches: list[Patch] = msgspec.field(default_factory=list)
    deadline_s: float = 600.0
    tenant: str = ""
    attempts: int = 0
    output_token_ids: list[int] = msgspec.field(default_factory=list)
    resumable: bool = False
    prefill_samples: bool = False
    prefix_hashes: list[str] = msgspec.field(default_factory=list)


class Cancel(Struct, frozen=True):
    """Endpoint → Broker: nobody wants this request's tokens any more; `reason` is "disconnect", "stop" or "cancel"."""

    request_id: str
    reason: str = "cancel"


class Upload(Struct, frozen=True):
    """Endpoint → Broker: encode these patches now and keep them for `ttl_s`, whoever asks for them.

    Opaque frames: each patch's, in order. Answered by UPLOADED.
    """

    upload_id: str
    patches: list[Patch]
    ttl_s: float


class Uploaded(Struct, frozen=True):
    """Broker → Endpoint: all patches of an upload can be read, or (`code` is not empty) why they are not kept."""

    upload_id: str
    code: str = ""
    message: str = ""
    status: int = 200


class DropUpload(Struct, frozen=True):
    """Endpoint → Broker: an upload is no longer needed; its patches stay as long as there is room."""

    upload_id: str


class RequestOutput(Struct, frozen=True):
    """What a request's engines have given since the last time.

    `num_frames` opaque frames hold the engine output; none if these fields say everything. `token_ids` are empty for an
    output that has only log-probabilities of the prompt. `num_before` counts the tokens of the whole answer that came
    before (-1: not said), so that missing and repeated tokens are noticed. `num_cached_tokens` is how many tokens of
    the prompt the prefill worker had cached; -1 until it has said so. With a `finish_reason` the request has ended, and
    its story is here.
    """

    request_id: str
    token_ids: list[int]
    num_before: int = -1
    num_cached_tokens: int = -1
    finish_reason: str = ""
    num_frames: int = 0
    story: list[StoryEvent] = msgspec.field(default_factory=list)


class Outputs(Struct, frozen=True):
    """Broker → Endpoint: new tokens of requests, and the last ones of those that have ended.

    Opaque frames: each output's, in order.
    """

    outputs: list[RequestOutput]


class Failed(Struct, frozen=True):
    """Broker → Endpoint: the request ends without an answer, and why.

    `status` is the HTTP status for the client, `code` a stable word, `retry_after_s` > 0 if trying again may help.
    """

    request_id: str
    code: str
    message: str
    status: int = 500
    retry_after_s: float = 0.0
    story: list[StoryEvent] = msgspec.field(default_factory=list)


class GetStory(Struct, frozen=True):
    """Endpoint → Broker: the story so far of a request in flight."""

    request_id: str


class Story(Struct, frozen=True):
    """Broker → Endpoint: a request's story so far; `found` is false if the broker does not have it."""

    request_id: str
    found: bool
    state: str = ""
    began_at: float = 0.0
    events: list[StoryEvent] = msgspec.field(default_factory=list)

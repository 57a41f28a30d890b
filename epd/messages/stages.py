"""Messages between the broker and the stage workers: encode, prefill, decode. Pure.

Broker and workers speak of legs: one leg is one attempt at a request. The first leg has the request's own id, each
later one an id that no worker has seen before.
"""

from __future__ import annotations

import msgspec

from epd.messages.parts import KvPeer, Slot, Struct


class EncodeJob(Struct, frozen=True):
    """One patch to encode, and the slot that it goes to; `num_frames` opaque frames hold its pixels and fields."""

    job_id: int
    patch_hash: str
    modality: str
    num_tokens: int
    num_frames: int
    slot: Slot


class Encode(Struct, frozen=True):
    """Broker → Encode: encode these patches into their slots. Opaque frames: each job's, in order."""

    jobs: list[EncodeJob]


class DropEncode(Struct, frozen=True):
    """Broker → Encode: nobody needs this patch any more; skip it if it has not been started. Answered in any case."""

    job_id: int


class EncodedJob(Struct, frozen=True):
    """A patch that is in its slot, and the slot's generation."""

    job_id: int
    generation: int


class Encoded(Struct, frozen=True):
    """Encode → Broker: these patches, a batch that took `took_s`, are in their slots."""

    jobs: list[EncodedJob]
    took_s: float


class EncodeFailed(Struct, frozen=True):
    """Encode → Broker: this patch could not be encoded.

    `dropped`: it was not started, because nobody needs it any more or because this worker is draining. `unstored`: it
    was encoded, but the host of its pool did not answer.
    """

    job_id: int
    message: str
    dropped: bool = False
    unstored: bool = False


class PatchReady(Struct, frozen=True):
    """A patch that can be read: its hash and the slot that holds it."""

    patch_hash: str
    slot: Slot


class Prefill(Struct, frozen=True):
    """Broker → Prefill: compute this request's KV. Opaque frames: the engine request.

    `ready` are the patches that can be read already; READY brings the others. `output_token_ids` were sampled by an
    earlier leg and follow the prompt. With `samples`, the next token is sampled here and comes with PREFILLED; if it
    `is_last`, nobody wants the KV.
    """

    leg_id: str
    ready: list[PatchReady] = msgspec.field(default_factory=list)
    output_token_ids: list[int] = msgspec.field(default_factory=list)
    samples: bool = False
    is_last: bool = False


class Ready(Struct, frozen=True):
    """Broker → Prefill or Decode: patches that this request waits for can be read now."""

    leg_id: str
    ready: list[PatchReady]


class Stale(Struct, frozen=True):
    """Prefill or Decode → Broker: a slot did not hold what it should; encode the patch again."""

    leg_id: str
    patch_hash: str
    generation: int
    reason: str


class Prefilled(Struct, frozen=True):
    """Prefill → Broker → Decode: all prompt tokens are computed.

    The request's slots may be unpinned, and the KV is under way to the decode worker, which polls for it from now on.
    `token_ids` is the token that was sampled here, if that was asked for, and `finish_reason` says that it is the last
    one: then no KV is needed. Opaque frames: the engine output with that token, or one with prompt log-probabilities if
    they were asked for, else none.
    """

    leg_id: str
    num_cached_tokens: int = 0
    took_s: float = 0.0
    token_ids: list[int] = msgspec.field(default_factory=list)
    finish_reason: str = ""


class Pushed(Struct, frozen=True):
    """Prefill → Broker: the KV of this request has been written to the decode worker."""

    leg_id: str


class Released(Struct, frozen=True):
    """Prefill or Decode → Broker: after an ABORT: the request is gone from here, and its slots are no longer read."""

    leg_id: str


class Abort(Struct, frozen=True):
    """Broker → Prefill or Decode: drop this request. Answered by RELEASED."""

    leg_id: str


class Decode(Struct, frozen=True):
    """Broker → Decode: register for this request's KV with `prefill`, then decode. Opaque frames: the engine request.

    Sent at the same time as PREFILL, so that nobody waits for the registration. `output_token_ids` are as there: they
    follow the prompt and count towards the output's limits, and only tokens after them are reported. With
    `awaits_token` the prefill worker samples the next one, which comes with PREFILLED: this worker goes on after it.
    """

    leg_id: str
    prefill: KvPeer
    output_token_ids: list[int] = msgspec.field(default_factory=list)
    awaits_token: bool = False


class NeedPatches(Struct, frozen=True):
    """Decode → Broker: the request was preempted and must be prefilled here; make these patches readable."""

    leg_id: str
    patch_hashes: list[str]


class LegOutput(Struct, frozen=True):
    """What one engine step gave a leg.

    `num_frames` opaque frames hold the engine output; none if these fields say everything. The broker keeps
    `token_ids`, so that another worker can go on where this one stopped; `num_before` counts the tokens of the whole
    answer that came before them (-1: not said). With its first tokens the decode worker says for how many tokens KV was
    pushed to it (it had that of the others); later this is -1. With a `finish_reason` they are the leg's last.
    """

    leg_id: str
    token_ids: list[int]
    num_before: int = -1
    num_pushed_tokens: int = -1
    finish_reason: str = ""
    num_frames: int = 0


class StepOutputs(Struct, frozen=True):
    """Decode → Broker: what one engine step gave all legs in it. Opaque frames: each output's, in order."""

    outputs: list[LegOutput]


class LegFailed(Struct, frozen=True):
    """Prefill or Decode → Broker: this leg ends here without an answer, and why; `code` as in FAILED."""

    leg_id: str
    code: str
    message: str

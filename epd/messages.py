"""The messages of every EPD socket: one typed struct per command, and the table of who may send it when.

Lives in every process. A message travels as ZeroMQ frames (`epd.wire`): a two-byte prefix (protocol version and
command), a MessagePack header that is one of the structs below, then opaque frames that only the engines read. The
broker reads headers and forwards opaque frames untouched.

Each docstring opens with the message's direction. Units are in the names: `_s` seconds, `_bytes` bytes, `num_*`
counts. `docs/protocol.md` is generated from `TABLE`.
"""

from __future__ import annotations

import enum
from typing import Any

import msgspec

PROTOCOL_VERSION = 1


class Role(enum.StrEnum):
    """What a peer of the broker does. The last three are the stages of the pipeline."""

    ENDPOINT = "endpoint"
    CACHE = "cache"
    ENCODE = "encode"
    PREFILL = "prefill"
    DECODE = "decode"


STAGES = (Role.ENCODE, Role.PREFILL, Role.DECODE)


class Struct(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Base of all message structs: immutable, no unknown fields, defaults left out on the wire."""


# --------------------------------------------------------------------------------------------------------------------
# Parts of messages


class Pool(Struct, frozen=True):
    """A block of memory that holds embeddings. `name` is what `cache.pools` opens it by; `nbytes` its size."""

    pool_id: str
    kind: str
    name: str
    nbytes: int
    host: str
    checksum: bool = True


class Slot(Struct, frozen=True):
    """An extent of a pool, for one patch: `offset` and `nbytes` cover the slot header and the embeddings.

    `generation` is new at each reuse of the memory; `num_tokens` x `width` elements of `dtype` follow the header.
    """

    pool_id: str
    offset: int
    nbytes: int
    generation: int
    num_tokens: int
    width: int
    dtype: str


class KvPeer(Struct, frozen=True):
    """Where a decode worker registers for pushed KV: the prefill worker's vLLM engine id and NIXL side channel."""

    engine_id: str
    host: str
    port: int
    tp_size: int = 1


class WorkerInfo(Struct, frozen=True):
    """What a worker says of itself when it registers; fields that its stage does not have stay empty.

    `widths` maps modality -> elements per embedding row; `dtype` is the embeddings' type ("bfloat16");
    `max_batch_tokens` bounds one encode batch; `kv_capacity_tokens` is the KV cache of a prefill or decode worker;
    `tower_bytes` and `language_bytes` count the parameters it really holds.
    """

    model: str = ""
    widths: dict[str, int] = {}
    dtype: str = ""
    max_batch_tokens: int = 0
    max_num_seqs: int = 0
    kv: KvPeer | None = None
    kv_capacity_tokens: int = 0
    tower_bytes: int = 0
    language_bytes: int = 0
    start_s: float = 0.0


class Patch(Struct, frozen=True):
    """One independently encodable piece of a request's multimodal items.

    `patch_hash` names its content; `num_tokens` are the embedding rows it gives; `num_frames` says how many of the
    message's opaque frames hold its pixels (their order is the order of the patches).
    """

    patch_hash: str
    modality: str
    num_tokens: int
    num_frames: int = 0


class StoryEvent(Struct, frozen=True):
    """One line of a request's story: `at_s` seconds after it was accepted, on the broker's clock."""

    at_s: float
    event: str
    worker: str = ""
    patch: str = ""
    took_s: float = 0.0
    detail: str = ""


class WorkerStatus(Struct, frozen=True):
    """One worker as the broker sees it, for `/ready`, `/metrics` and people."""

    name: str
    role: Role
    incarnation: str
    host: str
    pid: int
    num_outstanding: int = 0
    num_done: int = 0
    info: WorkerInfo = WorkerInfo()


class Counters(Struct, frozen=True):
    """The broker's own counts; monotonic but for the `held_*` gauges, which return to 0 when nothing is in flight."""

    num_accepted: int = 0
    num_refused: int = 0
    num_finished: int = 0
    num_failed: int = 0
    num_cancelled: int = 0
    num_encoded: int = 0
    num_cache_hits: int = 0
    num_coalesced: int = 0
    num_evicted: int = 0
    num_stale: int = 0
    num_fenced: int = 0
    held_requests: int = 0
    held_queued: int = 0
    held_pins: int = 0
    held_encodes: int = 0
    cache_bytes_used: int = 0
    cache_bytes_total: int = 0


# --------------------------------------------------------------------------------------------------------------------
# Registration


class Hello(Struct, frozen=True):
    """Any peer → Broker: registers under `name`; `incarnation` is new at each start and fences what came before."""

    name: str
    role: Role
    incarnation: str
    host: str
    pid: int
    info: WorkerInfo = WorkerInfo()
    pools: list[Pool] = []


class Welcome(Struct, frozen=True):
    """Broker → any peer: registered. Send a heartbeat every `heartbeat_s`; silent for `lost_after_s`, you are lost."""

    heartbeat_s: float
    lost_after_s: float
    pools: list[Pool] = []


class Pools(Struct, frozen=True):
    """Broker → worker: the pools have changed; slots named from now on are in these."""

    pools: list[Pool]


class Heartbeat(Struct, frozen=True):
    """Any peer → Broker: still here. `num_steps` counts engine steps, so that a hung engine shows."""

    num_steps: int = 0


class HeartbeatAck(Struct, frozen=True):
    """Broker → any peer: still here too."""


class Unknown(Struct, frozen=True):
    """Broker → any peer: you are not registered (the broker restarted, or you were silent too long). Say HELLO."""


class Goodbye(Struct, frozen=True):
    """Any peer → Broker: leaving in good order; nothing more will come."""

    reason: str = ""


class Status(Struct, frozen=True):
    """Broker → Endpoint: the workers and counters, at each change of the workers and with each heartbeat's answer."""

    workers: list[WorkerStatus]
    counters: Counters
    num_pools: int = 0


# --------------------------------------------------------------------------------------------------------------------
# A request, between endpoint and broker


class Submit(Struct, frozen=True):
    """Endpoint → Broker: a rendered request.

    Opaque frames: first `num_engine_frames` with the engine request, then each patch's in the order of `patches`.
    `max_tokens` bounds the output; `deadline_s` is how long from now the whole request may take.
    """

    request_id: str
    num_prompt_tokens: int
    max_tokens: int
    num_engine_frames: int
    patches: list[Patch] = []
    deadline_s: float = 600.0
    tenant: str = ""


class Cancel(Struct, frozen=True):
    """Endpoint → Broker: nobody wants this request's tokens any more; `reason` is "disconnect", "stop" or "cancel"."""

    request_id: str
    reason: str = "cancel"


class Tokens(Struct, frozen=True):
    """Decode → Broker → Endpoint: new tokens of a request, as one opaque engine output.

    `num_new_tokens` counts them for the story.
    """

    request_id: str
    num_new_tokens: int


class Finished(Struct, frozen=True):
    """Decode → Broker → Endpoint: the last engine output of a request; the broker adds the story."""

    request_id: str
    num_new_tokens: int
    finish_reason: str
    story: list[StoryEvent] = []


class Failed(Struct, frozen=True):
    """Worker → Broker → Endpoint: the request ends without an answer, and why.

    `status` is the HTTP status for the client, `code` a stable word, `retry_after_s` > 0 where trying again may help.
    """

    request_id: str
    code: str
    message: str
    status: int = 500
    retry_after_s: float = 0.0
    story: list[StoryEvent] = []


class GetStory(Struct, frozen=True):
    """Endpoint → Broker: the story so far of a request in flight."""

    request_id: str


class Story(Struct, frozen=True):
    """Broker → Endpoint: a request's story so far; `found` is false where the broker does not hold it."""

    request_id: str
    found: bool
    state: str = ""
    events: list[StoryEvent] = []


# --------------------------------------------------------------------------------------------------------------------
# Encode


class Encode(Struct, frozen=True):
    """Broker → Encode: encode this patch into this slot. Opaque frames: the patch's pixels and fields."""

    job_id: int
    patch_hash: str
    modality: str
    num_tokens: int
    slot: Slot


class DropEncode(Struct, frozen=True):
    """Broker → Encode: nobody needs this patch any more; skip it if it has not been started. It is answered anyway."""

    job_id: int


class Encoded(Struct, frozen=True):
    """Encode → Broker: the patch is in its slot. `took_s` is the time of the batch it was encoded in."""

    job_id: int
    generation: int
    took_s: float
    batch_size: int = 1


class EncodeFailed(Struct, frozen=True):
    """Encode → Broker: this patch could not be encoded (`dropped`: it was not started, as asked)."""

    job_id: int
    message: str
    dropped: bool = False


# --------------------------------------------------------------------------------------------------------------------
# Prefill


class PatchReady(Struct, frozen=True):
    """A patch that can be read: its hash and the slot that holds it."""

    patch_hash: str
    slot: Slot


class Prefill(Struct, frozen=True):
    """Broker → Prefill: compute this request's KV. Opaque frames: the engine request.

    `ready` are the patches that can be read already; READY brings the others.
    """

    request_id: str
    ready: list[PatchReady] = []


class Ready(Struct, frozen=True):
    """Broker → Prefill or Decode: patches that this request waits for can be read now."""

    request_id: str
    ready: list[PatchReady]


class Stale(Struct, frozen=True):
    """Prefill or Decode → Broker: a slot did not hold what it should; encode the patch again."""

    request_id: str
    patch_hash: str
    generation: int
    reason: str


class Prefilled(Struct, frozen=True):
    """Prefill → Broker → Decode: all prompt tokens are computed; the request's slots may be unpinned,
    and the KV is on its way to the decode worker, which looks for it from now on.

    Opaque frames: an engine output with prompt log-probabilities where they were asked for, else none.
    """

    request_id: str
    num_cached_tokens: int = 0
    queued_s: float = 0.0
    took_s: float = 0.0


class Pushed(Struct, frozen=True):
    """Prefill → Broker: the KV of this request has been written to the decode worker."""

    request_id: str


class Released(Struct, frozen=True):
    """Prefill or Decode → Broker: after an ABORT: the request is gone from here and its slots are not read any more."""

    request_id: str


class Abort(Struct, frozen=True):
    """Broker → Prefill or Decode: drop this request. Answered by RELEASED."""

    request_id: str


# --------------------------------------------------------------------------------------------------------------------
# Decode


class Decode(Struct, frozen=True):
    """Broker → Decode: register for this request's KV with `prefill`, then decode. Opaque frames: the engine request.

    Sent at the same time as PREFILL, so that the registration is never waited for.
    """

    request_id: str
    prefill: KvPeer


class NeedPatches(Struct, frozen=True):
    """Decode → Broker: the request was preempted and must be prefilled here; make these patches readable."""

    request_id: str
    patch_hashes: list[str]


# --------------------------------------------------------------------------------------------------------------------
# The table

Message = (
    Hello | Welcome | Pools | Heartbeat | HeartbeatAck | Unknown | Goodbye | Status
    | Submit | Cancel | Tokens | Finished | Failed | GetStory | Story
    | Encode | DropEncode | Encoded | EncodeFailed
    | Prefill | Ready | Stale | Prefilled | Pushed | Released | Abort
    | Decode | NeedPatches
)  # fmt: skip

BROKER = "broker"
_WORKERS = frozenset({Role.ENCODE, Role.PREFILL, Role.DECODE})
_ANY = frozenset(Role)


class Command(Struct, frozen=True):
    """One row of the table.

    `to_broker` are the roles that may send it to the broker, `from_broker` the roles that the broker may send it to.
    `state` says in words when it is legal: "new" before WELCOME, "registered" after it, or the state of the request
    or patch it names.
    """

    code: int
    struct: Any
    to_broker: frozenset[Role] = frozenset()
    from_broker: frozenset[Role] = frozenset()
    state: str = "registered"
    frames: str = "none"

    @property
    def name(self) -> str:
        """The command's name on paper, e.g. `SUBMIT`."""
        word = self.struct.__name__
        return "".join("_" + c if c.isupper() and i else c for i, c in enumerate(word)).upper()


_P, _D, _E = frozenset({Role.PREFILL}), frozenset({Role.DECODE}), frozenset({Role.ENCODE})
_PD, _EP = _P | _D, frozenset({Role.ENDPOINT})

TABLE: tuple[Command, ...] = (
    Command(code=1, struct=Hello, to_broker=_ANY, state="new"),
    Command(code=2, struct=Welcome, from_broker=_ANY, state="new"),
    Command(code=3, struct=Pools, from_broker=_WORKERS),
    Command(code=4, struct=Heartbeat, to_broker=_ANY),
    Command(code=5, struct=HeartbeatAck, from_broker=_ANY),
    Command(code=6, struct=Unknown, from_broker=_ANY, state="new"),
    Command(code=7, struct=Goodbye, to_broker=_ANY),
    Command(code=8, struct=Status, from_broker=_EP),
    Command(code=16, struct=Submit, to_broker=_EP, state="request unknown", frames="engine request, patches"),
    Command(code=17, struct=Cancel, to_broker=_EP, state="request in flight"),
    Command(code=18, struct=Tokens, to_broker=_D, from_broker=_EP, state="request decoding", frames="engine output"),
    Command(code=19, struct=Finished, to_broker=_D, from_broker=_EP, state="request decoding", frames="engine output"),
    Command(code=20, struct=Failed, to_broker=_PD, from_broker=_EP, state="request in flight"),
    Command(code=21, struct=GetStory, to_broker=_EP),
    Command(code=22, struct=Story, from_broker=_EP),
    Command(code=32, struct=Encode, from_broker=_E, state="patch allocated", frames="patch"),
    Command(code=33, struct=DropEncode, from_broker=_E, state="patch encoding"),
    Command(code=34, struct=Encoded, to_broker=_E, state="patch encoding"),
    Command(code=35, struct=EncodeFailed, to_broker=_E, state="patch encoding"),
    Command(code=48, struct=Prefill, from_broker=_P, state="request admitted", frames="engine request"),
    Command(code=49, struct=Ready, from_broker=_PD, state="request prefilling"),
    Command(code=50, struct=Stale, to_broker=_PD, state="request prefilling"),
    Command(
        code=51,
        struct=Prefilled,
        to_broker=_P,
        from_broker=_D,
        state="request prefilling",
        frames="engine output or none",
    ),
    Command(code=52, struct=Pushed, to_broker=_P, state="request prefilled"),
    Command(code=53, struct=Released, to_broker=_PD, state="request aborted"),
    Command(code=54, struct=Abort, from_broker=_PD, state="request in flight"),
    Command(code=64, struct=Decode, from_broker=_D, state="request admitted", frames="engine request"),
    Command(code=65, struct=NeedPatches, to_broker=_D, state="request decoding"),
)

BY_CODE: dict[int, Command] = {row.code: row for row in TABLE}
BY_STRUCT: dict[type, Command] = {row.struct: row for row in TABLE}

"""What messages are made of: kinds of peers, stages, pools, slots, patches, workers and stories. Pure.

`Struct` is the base of all of them: immutable, no unknown fields, defaults left out on the wire.
"""

from __future__ import annotations

import enum

import msgspec


class Kind(enum.StrEnum):
    """What a peer of the broker is, as long as it lives."""

    ENDPOINT = "endpoint"
    CACHE = "cache"
    WORKER = "worker"


class Stage(enum.StrEnum):
    """What a worker does for requests now; that may change while the worker is registered."""

    ENCODE = "encode"
    PREFILL = "prefill"
    DECODE = "decode"


class Struct(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True, frozen=True, kw_only=True, gc=False):
    """Base of all message structs: immutable, no unknown fields, defaults left out on the wire.

    Messages are never part of a reference cycle, so the garbage collector need not track them.
    """


class Pool(Struct, frozen=True):
    """A block of memory that holds embeddings. `cache.pools` opens it by its `name`; `nbytes` is its size.

    `address` is where processes on hosts other than `host` reach it; empty if they cannot. No slot of it may be smaller
    than `min_slot_bytes`.
    """

    pool_id: str
    kind: str
    name: str
    nbytes: int
    host: str
    checksum: bool = True
    address: str = ""
    min_slot_bytes: int = 0

    def reached_from(self, host: str) -> bool:
        """Whether a process of `host` can read and write it."""
        return host == self.host or bool(self.address)


class PoolFill(Struct, frozen=True):
    """How a pool is filled.

    `bytes_by_state` has "pinned", "ready", "allocated" and "quarantined"; the rest is free. `cells` divides the pool
    into equal parts and gives each the first letter of the state that takes most of it ("." for free).
    """

    pool: Pool
    bytes_by_state: dict[str, int]
    num_patches: int
    cells: str


class Slot(Struct, frozen=True):
    """An extent of a pool, for one patch: `offset` and `nbytes` cover the slot header and the embeddings.

    `generation` is new at each reuse of the memory; `num_tokens` x `width` elements of `dtype` follow the header.
    `owner` is the encode worker that wrote it, once it is written; a reader refuses a slot that says otherwise.
    """

    pool_id: str
    offset: int
    nbytes: int
    generation: int
    num_tokens: int
    width: int
    dtype: str
    owner: str = ""


class KvPeer(Struct, frozen=True):
    """Where a decode worker registers for pushed KV: the prefill worker's vLLM engine id and NIXL side channel."""

    engine_id: str
    host: str
    port: int
    tp_size: int = 1


class WorkerInfo(Struct, frozen=True):
    """What a worker says of itself when it registers; fields that its stage does not have stay empty.

    `widths` maps modality -> elements per embedding row; `dtype` is the embeddings' type ("bfloat16"); `owner` is what
    it writes into the slots that it fills; `max_batch_tokens` bounds one encode batch; `kv_capacity_tokens` is the KV
    cache of a prefill or decode worker; `tower_bytes` and `language_bytes` count the parameters that it really holds.
    An encode worker's `units` map modality -> what it has proved that items can be cut into ("tile"; "item": not cut),
    and `tokens_per_patch` modality -> embedding rows of a full such patch.
    """

    model: str = ""
    widths: dict[str, int] = {}
    dtype: str = ""
    owner: str = ""
    max_batch_tokens: int = 0
    max_num_seqs: int = 0
    kv: KvPeer | None = None
    kv_capacity_tokens: int = 0
    tower_bytes: int = 0
    language_bytes: int = 0
    units: dict[str, str] = {}
    tokens_per_patch: dict[str, int] = {}
    start_s: float = 0.0


class Patch(Struct, frozen=True):
    """One independently encodable piece of a request's multimodal items.

    `patch_hash` names its content; `num_tokens` are the embedding rows it gives; `num_frames` says how many of the
    message's opaque frames hold its pixels (their order is the order of the patches). A SUBMIT may leave them out
    (0) if the patch should be in the cache; if it is not, the answer is FAILED with `pixels_needed`.
    """

    patch_hash: str
    modality: str
    num_tokens: int
    num_frames: int = 0


class StoryEvent(Struct, frozen=True):
    """One line of a request's story: `at_s` seconds after it was accepted, on the broker's clock.

    `event` is one of `epd.journal.Happening`.
    """

    at_s: float
    event: str
    worker: str = ""
    patch: str = ""
    took_s: float = 0.0
    detail: str = ""


class JournalEntry(Struct, frozen=True):
    """Something that has happened at `at` (seconds since 1970, by the broker's clock): to a request, or to a worker.

    `event` is one of `epd.journal.Happening`; `request_id` is empty for what happens to a worker. `worker` is a name,
    `patch` a hash, `took_s` how long it took where that is known.
    """

    at: float
    event: str
    request_id: str = ""
    worker: str = ""
    patch: str = ""
    took_s: float = 0.0
    detail: str = ""


class WorkerStatus(Struct, frozen=True):
    """One worker as the broker sees it, for `/ready`, `/metrics` and people.

    A worker that is `draining` finishes what it has and gets nothing new. `held` and `gauges` are as in its last
    HEARTBEAT.
    """

    name: str
    stage: Stage
    incarnation: str
    host: str
    pid: int
    num_outstanding: int = 0
    num_done: int = 0
    draining: bool = False
    info: WorkerInfo = WorkerInfo()
    held: dict[str, int] = {}
    gauges: dict[str, float] = {}


class Counters(Struct, frozen=True):
    """The broker's own counts.

    `num_*` and `encode_s_saved` (seconds of encoding that hits and coalescing have saved) only grow. The others are
    gauges; `held_*` return to 0 when nothing is in flight, except `held_uploads`, which are kept until they expire.
    """

    num_accepted: int = 0
    num_refused: int = 0
    num_finished: int = 0
    num_failed: int = 0
    num_cancelled: int = 0
    num_retried: int = 0
    num_encoded: int = 0
    num_cache_hits: int = 0
    num_coalesced: int = 0
    num_evicted: int = 0
    num_stale: int = 0
    num_fenced: int = 0
    num_uploads: int = 0
    encode_s_saved: float = 0.0
    held_requests: int = 0
    held_queued: int = 0
    held_pins: int = 0
    held_encodes: int = 0
    held_uploads: int = 0
    cache_bytes_used: int = 0
    cache_bytes_pinned: int = 0
    cache_bytes_quarantined: int = 0
    cache_embeddings: int = 0
    cache_bytes_total: int = 0

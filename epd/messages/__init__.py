"""The messages of every EPD socket: one typed struct per command.

Lives in every process. A message travels as ZeroMQ frames (`epd.transport.wire`): a two-byte prefix (protocol version
and command), a MessagePack header that is one of these structs, then opaque frames that only the engines read. The
broker reads headers and forwards opaque frames untouched. Who may send what, and when, is in `epd.protocol`.

Each docstring opens with the message's direction. Units are in the names: `_s` seconds, `_bytes` bytes, `num_*`
counts.
"""

from epd.messages.parts import (
    Counters,
    JournalEntry,
    Kind,
    KvPeer,
    Patch,
    Pool,
    PoolFill,
    Slot,
    Stage,
    StoryEvent,
    Struct,
    WorkerInfo,
    WorkerStatus,
)
from epd.messages.peers import (
    CacheState,
    Draining,
    GetCache,
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    Hello,
    Journal,
    Pools,
    Serves,
    Status,
    Unknown,
    Watch,
    Welcome,
    Work,
    updated,
)
from epd.messages.requests import (
    Cancel,
    DropUpload,
    Failed,
    GetStory,
    Outputs,
    RequestOutput,
    Story,
    Submit,
    Upload,
    Uploaded,
)
from epd.messages.stages import (
    Abort,
    Decode,
    DropEncode,
    Encode,
    Encoded,
    EncodedJob,
    EncodeFailed,
    EncodeJob,
    LegFailed,
    LegOutput,
    NeedPatches,
    PatchReady,
    Prefill,
    Prefilled,
    Pushed,
    Ready,
    Released,
    Stale,
    StepOutputs,
)

Message = (
    Hello | Serves | Welcome | Pools | Heartbeat | HeartbeatAck | Unknown | Draining | Goodbye | Status
    | GetCache | CacheState | Watch | Journal
    | Submit | Cancel | Upload | Uploaded | DropUpload | Outputs | Failed | GetStory | Story
    | Encode | DropEncode | Encoded | EncodeFailed
    | Prefill | Ready | Stale | Prefilled | Pushed | Released | Abort
    | Decode | NeedPatches | StepOutputs | LegFailed
)  # fmt: skip

__all__ = [
    "Abort",
    "CacheState",
    "Cancel",
    "Counters",
    "Decode",
    "Draining",
    "DropEncode",
    "DropUpload",
    "Encode",
    "EncodeFailed",
    "EncodeJob",
    "Encoded",
    "EncodedJob",
    "Failed",
    "GetCache",
    "GetStory",
    "Goodbye",
    "Heartbeat",
    "HeartbeatAck",
    "Hello",
    "Journal",
    "JournalEntry",
    "Kind",
    "KvPeer",
    "LegFailed",
    "LegOutput",
    "Message",
    "NeedPatches",
    "Outputs",
    "Patch",
    "PatchReady",
    "Pool",
    "PoolFill",
    "Pools",
    "Prefill",
    "Prefilled",
    "Pushed",
    "Ready",
    "Released",
    "RequestOutput",
    "Serves",
    "Slot",
    "Stage",
    "Stale",
    "Status",
    "StepOutputs",
    "Story",
    "StoryEvent",
    "Struct",
    "Submit",
    "Unknown",
    "Upload",
    "Uploaded",
    "Watch",
    "Welcome",
    "Work",
    "WorkerInfo",
    "WorkerStatus",
    "updated",
]

"""The messages of every EPD socket: one typed struct per command.

Lives in every process. A message travels as ZeroMQ frames (`epd.transport.wire`): a two-byte prefix (protocol version
and command), a MessagePack header that is one of these structs, then opaque frames that only the engines read. The
broker reads headers and forwards opaque frames untouched. Who may send what when stands in `epd.protocol`.

Each docstring opens with the message's direction. Units are in the names: `_s` seconds, `_bytes` bytes, `num_*`
counts.
"""

from epd.messages.parts import (
    STAGES,
    Counters,
    KvPeer,
    Patch,
    Pool,
    PoolFill,
    Role,
    Slot,
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
    Pools,
    Status,
    Unknown,
    Welcome,
)
from epd.messages.requests import (
    Cancel,
    DropUpload,
    Failed,
    Finished,
    GetStory,
    Story,
    Submit,
    Tokens,
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
    NeedPatches,
    PatchReady,
    Prefill,
    Prefilled,
    Pushed,
    Ready,
    Released,
    Stale,
)

Message = (
    Hello | Welcome | Pools | Heartbeat | HeartbeatAck | Unknown | Draining | Goodbye | Status | GetCache | CacheState
    | Submit | Cancel | Upload | Uploaded | DropUpload | Tokens | Finished | Failed | GetStory | Story
    | Encode | DropEncode | Encoded | EncodeFailed
    | Prefill | Ready | Stale | Prefilled | Pushed | Released | Abort
    | Decode | NeedPatches
)  # fmt: skip

__all__ = [
    "STAGES",
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
    "Finished",
    "GetCache",
    "GetStory",
    "Goodbye",
    "Heartbeat",
    "HeartbeatAck",
    "Hello",
    "KvPeer",
    "Message",
    "NeedPatches",
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
    "Role",
    "Slot",
    "Stale",
    "Status",
    "Story",
    "StoryEvent",
    "Struct",
    "Submit",
    "Tokens",
    "Unknown",
    "Upload",
    "Uploaded",
    "Welcome",
    "WorkerInfo",
    "WorkerStatus",
]

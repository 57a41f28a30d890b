"""Who may send which message to whom, and when: one table, from which `docs/protocol.md` is generated.

Lives in every process; pure. The broker refuses what the table does not allow a kind of peer to send.
"""

from __future__ import annotations

from typing import Any

from epd import messages as m
from epd.messages import Kind, Stage
from epd.messages.parts import Struct

PROTOCOL_VERSION = 2

Speaker = Kind | Stage

_ANY: frozenset[Speaker] = frozenset(Kind)


class Command(Struct, frozen=True):
    """One row of the table.

    `to_broker` says who may send it to the broker, `from_broker` to whom the broker may send it: a kind of peer, or
    workers while they serve a stage. The broker refuses what a sender's kind may never send. What a worker's stage may
    not send cannot concern a leg or patch of that worker, and so changes nothing. `state` says in words when it is
    legal: "new" before WELCOME, "registered" after it, or the state of the request or patch it names.
    """

    code: int
    struct: Any
    to_broker: frozenset[Speaker] = frozenset()
    from_broker: frozenset[Speaker] = frozenset()
    state: str = "registered"
    frames: str = "none"

    @property
    def name(self) -> str:
        """The command's name in documentation, e.g. `SUBMIT`."""
        word = self.struct.__name__
        return "".join("_" + c if c.isupper() and i else c for i, c in enumerate(word)).upper()

    def may_come_from(self, kind: Kind) -> bool:
        """Whether a peer of this kind may ever send it to the broker."""
        return kind in self.to_broker or (kind is Kind.WORKER and not self.to_broker.isdisjoint(Stage))


_W, _EP = frozenset({Kind.WORKER}), frozenset({Kind.ENDPOINT})
_E, _P, _D = frozenset({Stage.ENCODE}), frozenset({Stage.PREFILL}), frozenset({Stage.DECODE})
_PD = _P | _D

TABLE: tuple[Command, ...] = (
    Command(code=1, struct=m.Hello, to_broker=_ANY, state="new"),
    Command(code=2, struct=m.Welcome, from_broker=_ANY, state="new"),
    Command(code=3, struct=m.Pools, from_broker=_W),
    Command(code=4, struct=m.Heartbeat, to_broker=_ANY),
    Command(code=5, struct=m.HeartbeatAck, from_broker=_ANY),
    Command(code=6, struct=m.Unknown, from_broker=_ANY, state="new"),
    Command(code=7, struct=m.Goodbye, to_broker=_ANY),
    Command(code=8, struct=m.Status, from_broker=_EP),
    Command(code=9, struct=m.GetCache, to_broker=_EP),
    Command(code=10, struct=m.CacheState, from_broker=_EP),
    Command(code=11, struct=m.Draining, to_broker=_W),
    Command(code=12, struct=m.Serves, to_broker=_W, state="nothing to do"),
    Command(code=13, struct=m.Watch, to_broker=_EP),
    Command(code=14, struct=m.Journal, from_broker=_EP, state="asked for by WATCH"),
    Command(code=16, struct=m.Submit, to_broker=_EP, state="request unknown", frames="engine request, patches"),
    Command(code=17, struct=m.Cancel, to_broker=_EP, state="request in flight"),
    Command(code=18, struct=m.StepOutputs, to_broker=_D, state="request started", frames="engine outputs"),
    Command(code=19, struct=m.Outputs, from_broker=_EP, state="request started", frames="engine outputs"),
    Command(code=20, struct=m.Failed, from_broker=_EP, state="request in flight"),
    Command(code=21, struct=m.GetStory, to_broker=_EP),
    Command(code=22, struct=m.Story, from_broker=_EP),
    Command(code=23, struct=m.Upload, to_broker=_EP, state="upload unknown", frames="patches"),
    Command(code=24, struct=m.Uploaded, from_broker=_EP, state="upload known"),
    Command(code=25, struct=m.DropUpload, to_broker=_EP, state="upload known"),
    Command(code=32, struct=m.Encode, from_broker=_E, state="patch allocated", frames="patch"),
    Command(code=33, struct=m.DropEncode, from_broker=_E, state="patch encoding"),
    Command(code=34, struct=m.Encoded, to_broker=_E, state="patch encoding"),
    Command(code=35, struct=m.EncodeFailed, to_broker=_E, state="patch encoding"),
    Command(code=48, struct=m.Prefill, from_broker=_P, state="request admitted", frames="engine request"),
    Command(code=49, struct=m.Ready, from_broker=_PD, state="request prefilling"),
    Command(code=50, struct=m.Stale, to_broker=_PD, state="request prefilling"),
    Command(
        code=51,
        struct=m.Prefilled,
        to_broker=_P,
        from_broker=_D,
        state="request prefilling",
        frames="engine output or none",
    ),
    Command(code=52, struct=m.Pushed, to_broker=_P, state="request prefilled"),
    Command(code=53, struct=m.Released, to_broker=_PD, state="request aborted"),
    Command(code=54, struct=m.Abort, from_broker=_PD, state="request in flight"),
    Command(code=55, struct=m.LegFailed, to_broker=_PD, state="request started"),
    Command(code=64, struct=m.Decode, from_broker=_D, state="request admitted", frames="engine request"),
    Command(code=65, struct=m.NeedPatches, to_broker=_D, state="request decoding"),
)

BY_CODE: dict[int, Command] = {row.code: row for row in TABLE}
BY_STRUCT: dict[type, Command] = {row.struct: row for row in TABLE}

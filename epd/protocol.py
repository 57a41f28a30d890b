"""Who may send which message to whom, and when: one table, from which `docs/protocol.md` is generated.

Lives in every process; pure. The broker refuses what the table does not allow a peer's role to send.
"""

from __future__ import annotations

from typing import Any

from epd import messages as m
from epd.messages import Role
from epd.messages.parts import Struct

PROTOCOL_VERSION = 1

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
    Command(code=1, struct=m.Hello, to_broker=_ANY, state="new"),
    Command(code=2, struct=m.Welcome, from_broker=_ANY, state="new"),
    Command(code=3, struct=m.Pools, from_broker=_WORKERS),
    Command(code=4, struct=m.Heartbeat, to_broker=_ANY),
    Command(code=5, struct=m.HeartbeatAck, from_broker=_ANY),
    Command(code=6, struct=m.Unknown, from_broker=_ANY, state="new"),
    Command(code=7, struct=m.Goodbye, to_broker=_ANY),
    Command(code=8, struct=m.Status, from_broker=_EP),
    Command(code=9, struct=m.GetCache, to_broker=_EP),
    Command(code=10, struct=m.CacheState, from_broker=_EP),
    Command(code=11, struct=m.Draining, to_broker=_WORKERS),
    Command(code=16, struct=m.Submit, to_broker=_EP, state="request unknown", frames="engine request, patches"),
    Command(code=17, struct=m.Cancel, to_broker=_EP, state="request in flight"),
    Command(code=18, struct=m.Tokens, to_broker=_D, from_broker=_EP, state="request started", frames="engine output"),
    Command(
        code=19, struct=m.Finished, to_broker=_D, from_broker=_EP, state="request decoding", frames="engine output"
    ),
    Command(code=20, struct=m.Failed, to_broker=_PD, from_broker=_EP, state="request in flight"),
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
    Command(code=64, struct=m.Decode, from_broker=_D, state="request admitted", frames="engine request"),
    Command(code=65, struct=m.NeedPatches, to_broker=_D, state="request decoding"),
)

BY_CODE: dict[int, Command] = {row.code: row for row in TABLE}
BY_STRUCT: dict[type, Command] = {row.struct: row for row in TABLE}

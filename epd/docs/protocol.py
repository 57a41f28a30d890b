"""The page `docs/protocol.md`, from `epd.protocol` and `epd.messages`; only the text between the facts is here.

Lives in a developer's process; pure.
"""

from __future__ import annotations

import enum
import inspect
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from epd.docs.parts import default, doc, note
from epd.messages import Kind, Stage, Struct
from epd.protocol import PROTOCOL_VERSION, TABLE, Command, Speaker
from epd.transport import link, wire

_PROTOCOL = """\
# The broker's protocol, version {version}

How the endpoint, the cache daemon and the workers talk to the broker, for people who debug a pipeline or write a peer.
The words MUST, MUST NOT, SHOULD and MAY are those of RFC 2119.

## Goals
- One broker joins any number of endpoints, cache daemons and workers; all decisions are made in one place.
- The broker reads headers only. Media, engine requests and engine outputs are opaque frames that it forwards.
- Every accepted request ends with exactly one last output or FAILED, or with neither if its endpoint has cancelled it
  or is gone.
- A restarted peer is never taken for its earlier self, and a message that comes too late changes nothing.
- A malformed message affects only its sender. Everything is bounded; nothing is pickled.

There is no authentication and no encryption. The addresses of the broker and of caches (`cache.address`) MUST be
reachable only from hosts that you trust; on a single host, use an `ipc://` address in a private folder. The broker's
state does not survive a restart; endpoints submit again what was in flight.

## Topology
The broker binds one ROUTER socket; each peer connects one DEALER socket. Peers do not talk to each other through
ZeroMQ, except for slots of another host's pool (`cache/pools/server.py`): embeddings go through the pools, KV goes
through NIXL from prefill to decode workers. The broker's socket has no ZeroMQ high-water mark; it is bounded by
admission and by each peer's outbox of {outbox:,} messages. `epd/transport/factory.py` makes all sockets with all their
options; the keys of an encrypted connection would go there too.

The routing id of a peer's socket is its **incarnation**: a new random word for each registration, of
16 hexadecimal digits here. ZeroMQ delivers messages for an earlier incarnation to nobody.

## Frames
| frame | content |
|---|---|
| 0 | 2 bytes: protocol version ({version}), command code |
| 1 | header: a MessagePack map, the fields of the command's struct by name |
| 2 … | opaque frames, as the command says |

On the broker's side, ROUTER prepends the routing id. There is no empty delimiter frame.

- A sender MAY leave out fields that have their default. It MUST NOT send fields that the struct does not have.
- A header has at most {header:,} bytes, a message at most {frames:,} frames without the routing id, and its opaque
  frames at most {message:,} bytes together. The last limit also applies to each frame (`ZMQ_MAXMSGSIZE`).
- A receiver MUST drop a message that breaks any of this. The broker counts it, logs the reason at most once a second,
  and sends no reply.

## Registration
```mermaid
sequenceDiagram
    participant P as Peer
    participant B as Broker
    P->>B: HELLO (again every {hello} s until answered)
    B->>P: WELCOME
    loop every heartbeat_s
        P->>B: HEARTBEAT
        B->>P: HEARTBEAT_ACK
    end
    P->>B: GOODBYE
```
- For each registration a peer MUST open a new socket with a new routing id, and name the same id in
  `HELLO.incarnation`. The broker drops a HELLO whose incarnation is not its routing id.
- A peer SHOULD repeat HELLO until WELCOME comes. HELLO of a registered incarnation is answered with WELCOME and changes
  nothing else. A worker SHOULD say HELLO only when its engine is ready.
- Names are unique. HELLO under a name that is registered ends the earlier incarnation as if it had been lost.
- The broker answers anything else from a peer that is not registered with UNKNOWN and drops it. A peer that gets
  UNKNOWN MUST drop all that it holds for the broker and register again.
- A peer MUST send HEARTBEAT every `heartbeat_s`. The broker takes a peer for lost that was silent for `lost_after_s`;
  a peer MUST do the same with the broker, and register again.
- After GOODBYE a peer MUST NOT send anything. The broker does not answer, and forgets the peer at once: its unfinished
  work ends as if the peer had been lost. A peer that wants to leave in good order finishes its work first.
- An endpoint also gets STATUS after WELCOME, with each HEARTBEAT_ACK, and when a peer comes or goes. A worker gets
  POOLS when the pools change.
- The broker drops a message that its sender's kind may not send, and one that is not legal in the state of the request
  or patch it names (see the commands).

## A request
```mermaid
sequenceDiagram
    participant A as Endpoint
    participant B as Broker
    participant E as Encode
    participant P as Prefill
    participant D as Decode
    A->>B: SUBMIT
    B->>P: PREFILL
    B->>D: DECODE
    B->>E: ENCODE (missing patches)
    E->>B: ENCODED
    B->>P: READY
    P->>B: PREFILLED
    B->>D: PREFILLED
    P-->>D: KV, through NIXL
    P->>B: PUSHED
    loop each engine step
        D->>B: STEP_OUTPUTS (of all legs in it)
        B->>A: OUTPUTS
    end
```
- An endpoint MAY submit a request again to a broker that does not have it, under the same `request_id`, with more
  `attempts`, and with the tokens that it has as `output_token_ids`; OUTPUTS then carry only what follows them.
- `request_id` MUST be new: while a request with that id is in flight, another one is refused (`duplicate_request`).
- The broker answers SUBMIT with FAILED if it refuses the request, and sends nothing else for it.
- PREFILL, DECODE and the first ENCODEs go out together, once the request has all its slots and room on a decode worker.
- READY MAY name one patch or several, in any order. A prefill worker MAY compute the tokens before the first patch that
  is missing.
- KV goes from worker to worker, so STEP_OUTPUTS MAY reach the broker before PREFILLED and PUSHED. The broker keeps a
  leg's last output until PREFILLED has come.
- ENCODED names the generation of each slot that was written. The broker MUST ignore any but the current one.
- A reader that finds something else in a slot MUST NOT use it. A prefill worker says STALE and gets READY when the
  patch has been encoded again; a decode worker ends the leg with LEG_FAILED.
- A worker MUST answer ABORT with RELEASED, or with the PREFILLED, last output or LEG_FAILED that was under way. Until
  then the broker keeps the request's slots pinned.
- A worker MUST answer each job of an ENCODE once, with ENCODED or ENCODE_FAILED, also after DROP_ENCODE.
- UPLOAD is answered by UPLOADED when all its patches can be read, or with a code. The broker holds it while encode
  workers or pools are away, as it holds requests.
- CANCEL has no answer. Outputs of that request MAY still arrive and MUST be ignored.
"""


def protocol() -> str:
    """The page `docs/protocol.md`."""
    lines = [
        note("epd/protocol.py and epd/messages/"),
        _PROTOCOL.format(
            version=PROTOCOL_VERSION,
            header=wire.MAX_HEADER_BYTES,
            frames=wire.MAX_FRAMES,
            message=wire.MAX_MESSAGE_BYTES,
            outbox=link.MAX_OUTBOX,
            hello=link._HELLO_EVERY_S,
        ),
        "## Commands",
        "| code | command | to the broker from | from the broker to | when | opaque frames |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row.code} | [{row.name}](#{row.name.lower()}) | {_speakers(row.to_broker)} "
            f"| {_speakers(row.from_broker)} | {row.state} | {row.frames} |"
            for row in TABLE
        ),
        "",
        '"new" is before WELCOME, "registered" after it; other words name the state that the request or patch must '
        "be in.",
        "",
        *(line for row in TABLE for line in _command(row)),
        "## Parts of messages",
        "",
        *(line for part in _parts() for line in _struct(part)),
        "## Codes of FAILED",
        "FAILED and UPLOADED have a code of [errors.md](errors.md) and its HTTP status.",
    ]
    return "\n".join(lines) + "\n"


def _speakers(speakers: Iterable[Speaker]) -> str:
    """Kinds of peers, and stages of workers, in words."""
    found = frozenset(speakers)
    names = [one.value for one in (*Kind, *Stage) if one in found]
    return "any" if found == frozenset(Kind) else ", ".join(names)


def _command(row: Command) -> Iterator[str]:
    yield f"### {row.name}"
    yield f"Code {row.code} · when: {row.state} · opaque frames: {row.frames}"
    yield ""
    yield from _body(row.struct)


def _struct(struct: Any) -> Iterator[str]:
    yield f"### {struct.__name__}"
    yield from _body(struct)


def _body(struct: Any) -> Iterator[str]:
    yield doc(struct)
    yield ""
    fields = msgspec.structs.fields(struct)
    if not fields:
        yield "No fields."
    else:
        yield "| field | type | default |"
        yield "|---|---|---|"
        yield from (f"| `{field.name}` | {_python_type(field.type)} | {default(field)} |" for field in fields)
    yield ""


def _parts() -> list[Any]:
    """The structs that messages consist of, in the order in which the table reaches them."""
    commands = {row.struct for row in TABLE}
    found: dict[Any, None] = {}
    waiting = [row.struct for row in TABLE]
    while waiting:
        for field in msgspec.structs.fields(waiting.pop(0)):
            for each in _leaves(field.type):
                if inspect.isclass(each) and issubclass(each, Struct) and each not in commands and each not in found:
                    found[each] = None
                    waiting.append(each)
    return list(found)


def _leaves(kind: Any) -> Iterator[Any]:
    yield kind
    for each in typing.get_args(kind):
        yield from _leaves(each)


def _python_type(kind: Any) -> str:
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return " or ".join(_python_type(each) for each in typing.get_args(kind))
    if arguments := typing.get_args(kind):
        return f"{typing.get_origin(kind).__name__} of {' to '.join(_python_type(each) for each in arguments)}"
    if kind is type(None):
        return "nil"
    if issubclass(kind, enum.Enum):
        return ", ".join(f"`{each.value}`" for each in kind)
    return f"[{kind.__name__}](#{kind.__name__.lower()})" if issubclass(kind, Struct) else str(kind.__name__)

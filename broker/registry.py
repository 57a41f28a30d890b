"""The peers that the broker knows, and what each has on its hands. Pure; lives in the broker's decision core."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from epd.messages import Hello, Pool, Role, WorkerInfo, WorkerStatus


@dataclasses.dataclass(slots=True, eq=False)
class Peer:
    """One registered incarnation of an endpoint, a cache daemon or a worker.

    `load_tokens` is what is outstanding here, in the unit that its stage is limited by: embedding rows to encode,
    prompt tokens to prefill, or KV tokens reserved for decoding. `jobs` and `requests` are the ids of jobs and of
    requests' legs that it works on.
    `stepped_at` is when its engine made a step, or had nothing to do; one that is `draining` gets nothing new.
    """

    peer_id: str
    name: str
    role: Role
    host: str
    pid: int
    info: WorkerInfo
    pools: list[Pool]
    heard_at: float
    load_tokens: int = 0
    num_done: int = 0
    num_steps: int = 0
    stepped_at: float = 0.0
    draining: bool = False
    jobs: set[int] = dataclasses.field(default_factory=set)
    requests: set[str] = dataclasses.field(default_factory=set)
    held: dict[str, int] = dataclasses.field(default_factory=dict)
    gauges: dict[str, float] = dataclasses.field(default_factory=dict)

    def status(self) -> WorkerStatus:
        """This peer as shown to people."""
        return WorkerStatus(
            name=self.name,
            role=self.role,
            incarnation=self.peer_id,
            host=self.host,
            pid=self.pid,
            num_outstanding=len(self.jobs) or len(self.requests),
            num_done=self.num_done,
            draining=self.draining,
            info=self.info,
            held=self.held,
            gauges=self.gauges,
        )


class Registry:
    """Registered peers by incarnation. At most one incarnation of a name is registered at a time."""

    def __init__(self) -> None:
        self._peers: dict[str, Peer] = {}

    def __iter__(self) -> Iterator[Peer]:
        return iter(self._peers.values())

    def get(self, peer_id: str) -> Peer | None:
        """The peer of that incarnation, if it is registered."""
        return self._peers.get(peer_id)

    def named(self, name: str) -> Peer | None:
        """The registered incarnation of `name`."""
        return next((peer for peer in self if peer.name == name), None)

    def add(self, peer_id: str, hello: Hello, now: float) -> Peer:
        """Registers the sender of `hello`."""
        peer = Peer(peer_id, hello.name, hello.role, hello.host, hello.pid, hello.info, hello.pools, now)
        peer.stepped_at = now
        self._peers[peer_id] = peer
        return peer

    def remove(self, peer_id: str) -> None:
        """Forgets a peer."""
        self._peers.pop(peer_id, None)

    def of(self, role: Role) -> list[Peer]:
        """The registered peers of a role, in the order they came."""
        return [peer for peer in self if peer.role is role]

    def serving(self, role: Role) -> list[Peer]:
        """The peers of a role that take new work, in the order they came."""
        return [peer for peer in self.of(role) if not peer.draining]

    def silent_since(self, moment: float) -> list[Peer]:
        """The peers not heard from after `moment`."""
        return [peer for peer in self if peer.heard_at < moment]

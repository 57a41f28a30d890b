"""What carries messages between the broker and its peers in virtual time, and knows who is there. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

from broker.core.core import Core
from broker.virtual.broker import Broker
from broker.virtual.clock import Clock
from epd.config import BrokerConfig
from epd.messages import Message

if TYPE_CHECKING:
    from broker.virtual.link import Peer
    from broker.virtual.workers import KvWorker

Frames = Sequence[bytes]
# Gets each message: the time in seconds, sender and receiver (an incarnation, or "broker"), and the message.
Observer = Callable[[float, str, str, Message, Frames], None]


class Network:
    """A broker and a place for its peers; a message takes `latency_s`, and none is lost.

    Args:
        config: of the broker.
        latency_s: from any peer to the broker, and back.
        make_core: makes the broker's core, of its configuration and its first generation.

    Attributes:
        peers: who is there, by incarnation.
        engines: by their ids, the workers that can push KV to each other.
        numbers: for names that must never come twice.
        observe: called for each message that is sent, if given.
    """

    def __init__(
        self, config: BrokerConfig, latency_s: float = 0.0, make_core: Callable[[BrokerConfig, int], Core] = Core
    ) -> None:
        self.config, self.latency_s, self.make_core = config, latency_s, make_core
        self.clock = Clock()
        self.numbers = itertools.count(1)
        self.peers: dict[str, Peer] = {}
        self.engines: dict[str, KvWorker] = {}
        self.observe: Observer | None = None
        self.broker = Broker(self)

    @property
    def now(self) -> float:
        """Seconds since the beginning."""
        return self.clock.now

    def to_broker(self, peer: Peer, message: Message, frames: Frames = ()) -> None:
        """A peer sends a message, as its current incarnation."""
        incarnation = peer.incarnation
        if self.observe is not None:
            self.observe(self.now, incarnation, self.broker.name, message, frames)
        self.broker.later(self.latency_s, partial(self.broker.receive, incarnation, message, frames))

    def to_peer(self, incarnation: str, message: Message, frames: Frames) -> None:
        """The broker sends a message; it is lost if that incarnation is gone."""
        if self.observe is not None:
            self.observe(self.now, self.broker.name, incarnation, message, frames)
        peer = self.peers.get(incarnation)
        if peer is not None:
            peer.later(self.latency_s, partial(self._hand_over, peer, incarnation, message, frames))

    def _hand_over(self, peer: Peer, incarnation: str, message: Message, frames: Frames) -> None:
        if self.peers.get(incarnation) is peer:
            peer.receive(message, frames)

"""A peer's registration with the broker in virtual time, as `epd.transport.link` keeps it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from broker.virtual.process import Process
from epd import messages as m
from epd.messages import Kind, Message, Stage

if TYPE_CHECKING:
    from broker.virtual.network import Network

HELLO_EVERY_S = 0.5


class Peer(Process):
    """A daemon that registers with the broker, sends heartbeats, and registers again if it is not known.

    Attributes:
        role: what it is; of a worker, the stage it serves.
        incarnation: its name and a number that is new each time it registers.
        registered: the broker has welcomed this incarnation.
    """

    role: Kind | Stage

    def __init__(self, network: Network, name: str, host: str = "h", restart_s: float | None = 2.0) -> None:
        super().__init__(network.clock, name, restart_s)
        self.network, self.host = network, host
        self.incarnation = ""
        self.registered = False
        self._heard_at = 0.0

    # ---- what kinds of peers differ in -----------------------------------------------------------------------------

    def info(self) -> m.WorkerInfo:
        """What a worker says of itself."""
        return m.WorkerInfo()

    def pools(self) -> list[m.Pool]:
        """The pools of a cache."""
        return []

    def heartbeat(self) -> m.Heartbeat:
        """What it reports of itself now."""
        return m.Heartbeat()

    def welcomed(self, welcome: m.Welcome) -> None:
        """The broker has registered this peer."""

    def lost(self, reason: str) -> None:
        """The broker is gone, and with it all that it knew."""

    def take(self, message: Message, frames: Sequence[bytes]) -> None:
        """Handles a message that is not the link's."""

    # ---- the link --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins a life, and registers."""
        self.incarnation = f"{self.name}#{next(self.network.numbers)}"
        self.registered = False
        self.network.peers[self.incarnation] = self
        self._hello(self.incarnation)

    def _hello(self, incarnation: str) -> None:
        if self.registered or incarnation != self.incarnation:
            return
        stage = self.role if isinstance(self.role, Stage) else None
        kind = Kind.WORKER if isinstance(self.role, Stage) else self.role
        hello = m.Hello(
            name=self.name, kind=kind, stage=stage, incarnation=incarnation, host=self.host, pid=1, info=self.info(),
            pools=self.pools(),
        )  # fmt: skip
        self.network.to_broker(self, hello)
        self.later(HELLO_EVERY_S, lambda: self._hello(incarnation))

    def died(self) -> None:
        """Tells the broker nothing: it has to notice."""
        self.network.peers.pop(self.incarnation, None)
        self.registered = False

    def say(self, message: Message, frames: Sequence[bytes] = ()) -> None:
        """Sends a message to the broker, if this peer is registered."""
        if self.registered:
            self.network.to_broker(self, message, frames)

    def leave(self, reason: str = "") -> None:
        """Says GOODBYE and ends for good."""
        self.say(m.Goodbye(reason=reason))
        self.end()

    def heard(self) -> None:
        """Something has come from the broker, readable or not."""
        self._heard_at = self.clock.now

    def receive(self, message: Message, frames: Sequence[bytes]) -> None:
        """A message has come from the broker."""
        self.heard()
        match message:
            case m.HeartbeatAck():
                pass
            case m.Welcome() if not self.registered:
                self.registered = True
                self.welcomed(message)
                incarnation = self.incarnation
                self.later(message.heartbeat_s, lambda: self._beat(incarnation, message))
            case m.Welcome():
                pass
            case m.Unknown():
                if self.registered:
                    self._lose("the broker does not know this incarnation")
            case _ if self.registered:
                self.take(message, frames)

    def _beat(self, incarnation: str, welcome: m.Welcome) -> None:
        if incarnation != self.incarnation:
            return
        self.say(self.heartbeat())
        if self.clock.now - self._heard_at > welcome.lost_after_s:
            self._lose("the broker was silent")
        else:
            self.later(welcome.heartbeat_s, lambda: self._beat(incarnation, welcome))

    def _lose(self, reason: str) -> None:
        self.network.peers.pop(self.incarnation, None)
        self.registered = False
        self.lost(reason)
        Peer.start(self)


class Cache(Peer):
    """A cache daemon with one pool, a new one each time it starts.

    Args:
        pool_bytes: the size of its pool.
    """

    role = Kind.CACHE

    def __init__(
        self, network: Network, name: str, pool_bytes: int, host: str = "h", restart_s: float | None = 2.0
    ) -> None:
        super().__init__(network, name, host, restart_s)
        self._pool_bytes = pool_bytes
        self.pool_id = ""

    def start(self) -> None:
        """Begins a life with an empty pool."""
        self.pool_id = f"pool{next(self.network.numbers)}"
        super().start()

    def pools(self) -> list[m.Pool]:
        """Its pool."""
        pool_id, nbytes = self.pool_id, self._pool_bytes
        return [m.Pool(pool_id=pool_id, kind="shared_memory", name=pool_id, nbytes=nbytes, host=self.host)]

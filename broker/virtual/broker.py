"""The broker in virtual time: the decision core, as `broker.daemon` runs it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from broker.core.core import Core
from broker.core.outbox import Send
from broker.virtual.process import Process
from epd.messages import Message

if TYPE_CHECKING:
    from broker.virtual.network import Network

TICK_S = 0.25


class Broker(Process):
    """The broker; each of its lives has a core that knows nothing of the one before."""

    core: Core

    def __init__(self, network: Network, name: str = "broker") -> None:
        super().__init__(network.clock, name)
        self._network = network

    def start(self) -> None:
        """Begins with a new core, whose generations are above all earlier ones."""
        self.core = self._network.make_core(self._network.config, 1 + int(self.clock.now * 1e6))
        self._tick()

    def _tick(self) -> None:
        self._perform(self.core.tick(self.clock.now))
        self.later(TICK_S, self._tick)

    def receive(self, incarnation: str, message: Message, frames: Sequence[bytes]) -> None:
        """Handles a message from a peer."""
        self._perform(self.core.handle(incarnation, message, frames, self.clock.now))

    def _perform(self, sends: list[Send]) -> None:
        for incarnation, message, frames in sends:
            self._network.to_peer(incarnation, message, frames)

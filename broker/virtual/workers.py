"""Workers in virtual time: what the three stages share. Pure.

A worker has one engine, which makes one step at a time; the cost model says how long that takes. What comes meanwhile
waits for the next step.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from broker.virtual.costs import FREE, CostModel
from broker.virtual.link import Peer
from epd import messages as m
from epd.messages import Stage

if TYPE_CHECKING:
    from broker.virtual.network import Network


class EngineRequest(msgspec.Struct, frozen=True, gc=False):
    """Stands for the engine's part of a request, in its opaque frame.

    `num_outputs` is how long the answer gets; `patches` are hashes in the order of the prompt, `starts` the places
    in it (in tokens) before which everything can be computed without them; none: all that is text comes first.
    """

    num_prompt_tokens: int
    num_outputs: int
    patches: list[str] = []
    starts: list[int] = []


class StageWorker(Peer, abc.ABC):
    """A worker of one stage.

    Args:
        network: where its broker is.
        name: its name.
        info: what it says of itself.
        costs: what its steps take.
        host: where it runs.
        restart_s: see `broker.virtual.process.Process`.

    Attributes:
        num_steps: how many steps its engine has made in this life.
        draining: it was asked to stop, and gets nothing new.
    """

    role: Stage

    def __init__(
        self,
        network: Network,
        name: str,
        info: m.WorkerInfo,
        costs: CostModel = FREE,
        host: str = "h",
        restart_s: float | None = 2.0,
    ) -> None:
        super().__init__(network, name, host, restart_s)
        self._info, self._costs = info, costs

    def start(self) -> None:
        """Begins a life with an empty engine."""
        self.num_steps = 0
        self.draining = self._is_stepping = False
        self._work = m.Work()
        self._reset()
        super().start()

    def info(self) -> m.WorkerInfo:
        """As it was given."""
        return self._info

    def heartbeat(self) -> m.Heartbeat:
        """A heartbeat with what its engine has done."""
        return m.Heartbeat(num_steps=self.num_steps, work=self._work)

    def lost(self, reason: str) -> None:
        """Drops what it has, which nobody wants any more."""
        self._reset()

    def drain(self) -> None:
        """Acts like SIGTERM: it finishes what it has and leaves."""
        self.draining = True
        self.say(m.Draining())
        self._hand_back()
        self._leave_if_done()

    def _leave_if_done(self) -> None:
        if self.draining and self.alive and not self.holds():
            self.leave("stopped")

    # ---- the engine ------------------------------------------------------------------------------------------------

    def wake(self) -> None:
        """Looks whether there is something to do."""
        if not self._is_stepping:
            self._is_stepping = True
            self.later(0.0, self._begin)

    def _begin(self) -> None:
        took_s = self._begin_step()
        if took_s is None:
            self._is_stepping = False
            self._leave_if_done()
        else:
            self.later(took_s, partial(self._end, took_s))

    def _end(self, took_s: float) -> None:
        self.num_steps += 1
        num_units = self._end_step(took_s)
        self._work = m.Work(busy_s=self._work.busy_s + took_s, num_units=self._work.num_units + num_units)
        self._begin()

    # ---- what stages differ in -------------------------------------------------------------------------------------

    @abc.abstractmethod
    def holds(self) -> int:
        """How much it holds for requests; 0 when everything is idle."""

    @abc.abstractmethod
    def _reset(self) -> None:
        """Its engine is empty."""

    @abc.abstractmethod
    def _begin_step(self) -> float | None:
        """Chooses what is in the next step; returns how long that takes, or None if there is nothing to do."""

    @abc.abstractmethod
    def _end_step(self, took_s: float) -> int:
        """Reports what the step has given; returns how many units of work that was (`epd.messages.Work`)."""

    def _hand_back(self) -> None:
        """Gives back what need not be finished here; nothing, by default."""


class KvWorker(StageWorker):
    """A worker with KV, which others reach by the id of its engine: another one in each life."""

    def start(self) -> None:
        """Begins a life with another engine."""
        self.engine_id = f"{self.name}.{next(self.network.numbers)}"
        self.network.engines[self.engine_id] = self
        super().start()

    def died(self) -> None:
        """Its KV is gone with it."""
        super().died()
        del self.network.engines[self.engine_id]

    def info(self) -> m.WorkerInfo:
        """With how its engine is reached."""
        return msgspec.structs.replace(self._info, kv=m.KvPeer(engine_id=self.engine_id, host=self.host, port=1))

    def register(self, leg_id: str, engine_id: str) -> None:
        """Another worker's engine waits for a leg's KV from here; only one that prefills ever has any."""

    def kv_there(self, leg_id: str) -> None:
        """Another worker's engine has pushed a leg's KV; only one that decodes has asked for any."""


def engine_request(frames: Sequence[bytes]) -> EngineRequest:
    """The engine's part of a request."""
    return msgspec.msgpack.decode(frames[0], type=EngineRequest)

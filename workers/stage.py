"""What the three stages share: the engine, its pools, and messages out. Lives in a worker's engine thread.

A stage's `handle` runs in the engine thread between two steps; `post` hands messages to the event loop.
"""

from __future__ import annotations

import abc
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import structlog

from epd.config import Config
from epd.messages import Message, Pool, Stage, Work, WorkerInfo
from workers.resources import of_engine

if TYPE_CHECKING:
    from workers.engine import Engine

log = structlog.get_logger()

Frames = Sequence[bytes]
_MAX_SEEN = 8192
Post = Callable[[Message, Frames], None]


class StageRunner(abc.ABC):
    """One stage's side of the engine thread (`workers.thread.Steps`).

    Args:
        config: the pipeline's configuration.
        name: this worker's name.
        post: sends a message to the broker; called in the engine thread.
        call: runs a command in the engine thread, between two steps; may be called from any thread.
        clock: seconds of any monotonic clock.
    """

    stage: Stage

    def __init__(
        self,
        config: Config,
        name: str,
        post: Post,
        call: Callable[..., None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._name, self._post, self._call, self.clock = config, name, post, call, clock
        self.engine: Engine
        self.draining = False
        self._seen: OrderedDict[str, None] = OrderedDict()
        self.info = WorkerInfo()
        self.work = Work()

    def start(self) -> None:
        """Builds the engine."""
        from workers.engine import Engine

        self.engine = Engine(self._config, self.stage, self._name)
        self.info = self.engine.info()

    def stop(self) -> None:
        """Frees the engine."""
        self.engine.shutdown()

    def held(self) -> dict[str, int]:
        """What the engine and its connector hold, by kind; 0 when nothing is in flight."""
        return of_engine(self.engine)

    def gauges(self) -> dict[str, float]:
        """What the engine reports for metrics; nothing if it has no KV."""
        return {} if self.stage is Stage.ENCODE else self.engine.gauges.read()

    def has_work(self) -> bool:
        """Whether the engine has anything to step for."""
        return self.engine.has_requests()

    def set_pools(self, pools: list[Pool]) -> None:
        """The pools have changed."""
        for reason in self.engine.connector.set_pools(pools):
            log.warning("pool not opened", reason=reason)

    def is_new(self, leg_id: str) -> bool:
        """Whether a leg is new here: the engine must never get the same one twice."""
        if leg_id in self._seen:
            return False
        self._seen[leg_id] = None
        if len(self._seen) > _MAX_SEEN:
            self._seen.popitem(last=False)
        return True

    def did(self, busy_s: float, num_units: int) -> None:
        """Counts that the model ran for `busy_s` and did `num_units` of this stage's work (`epd.messages.Work`)."""
        before = self.work  # replaced, never modified: the event loop reads it
        self.work = Work(busy_s=before.busy_s + busy_s, num_units=before.num_units + num_units)

    def leak(self, now: float) -> str:
        """Why this worker should be replaced, if its engine holds memory for nobody (`workers.leaks`); otherwise "".

        `now` is in seconds of any monotonic clock.
        """
        return ""

    def drain(self) -> None:
        """This worker is to stop: work that it has begun is finished, the rest may be handed back."""
        self.draining = True

    @abc.abstractmethod
    def handle(self, message: Message, frames: Frames) -> None:
        """Handles a message from the broker."""

    @abc.abstractmethod
    def step(self) -> bool:
        """Makes one engine step and reports its results; returns whether the model ran."""

    @abc.abstractmethod
    def poll_s(self, num_idle_steps: int) -> float | None:
        """See `workers.thread.Steps`."""

    @abc.abstractmethod
    def reset(self) -> None:
        """Drops everything held for a broker that is lost."""


def ever_later(bounds_s: tuple[float, float], num_idle_steps: int) -> float:
    """How long to sleep before looking again after `num_idle_steps` futile looks: rises from the first to the last."""
    first, last = bounds_s
    return min(first * 1.5**num_idle_steps, last) if num_idle_steps < 32 else last

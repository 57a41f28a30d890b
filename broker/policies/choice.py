"""Which worker gets a piece of work. Pure; chosen by name in the configuration, per stage.

A choice gives each worker a rank; the lowest goes first. A rank changes only when the worker's own load does, so
`broker.core.stage_workers` can keep the workers of a stage sorted by it.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

from broker.policies.costs import Cost

Rank = tuple[float, ...]

# How many affinity keys are remembered; the least recently given are forgotten.
_MAX_KNOWN = 65_536


class Candidate(Protocol):
    """What a choice knows of a worker.

    `load_units` is its outstanding work in the unit of its stage, `num_tasks` how many requests or patches that is,
    `cost` what a unit costs, `room_units` how much it can be given at most now.
    """

    peer_id: str
    host: str
    cost: Cost

    @property
    def load_units(self) -> int:
        """See the class, as for those below."""

    @property
    def num_tasks(self) -> int:
        """How many requests or patches."""

    @property
    def room_units(self) -> int:
        """How much more."""


# Whether a worker can take a piece of work now.
Takes = Callable[[Candidate], bool]


class Choice(Protocol):
    """How one of a stage's workers is chosen; each stage has an instance of its own."""

    def rank(self, worker: Candidate) -> Rank:
        """The current rank of a worker."""

    def chosen(self, worker: Candidate, keys: Sequence[str]) -> None:
        """A worker was given work on what these keys name."""

    def favourite(self, keys: Sequence[str]) -> str | None:
        """The id of the worker that has most of what these keys name, if this choice cares and it is known."""

    def is_worth(self, favourite: Candidate, best: Candidate, num_units: int) -> bool:
        """Whether `favourite` is taken for work of `num_units` although `best` has the lowest rank."""


class LeastLoaded:
    """The least outstanding work: in estimated seconds if costs are known, else in units.

    A worker whose cost is not known yet counts as the average of the others: as free, it would be given everything; as
    costly, it would get nothing to learn from.
    """

    # Whether a worker that has enough is passed by; else work waits for it, as it is the soonest to be done with it.
    passes_by = False

    def __init__(self) -> None:
        self._known: dict[str, float] = {}
        self._sum = 0.0

    def learnt(self, worker: Candidate) -> None:
        """The cost of a worker's work has changed."""
        self._sum += worker.cost.s_per_unit - self._known.get(worker.peer_id, 0.0)
        self._known[worker.peer_id] = worker.cost.s_per_unit

    def gone(self, worker: Candidate) -> None:
        """A worker has left the stage."""
        self._sum -= self._known.pop(worker.peer_id, 0.0)

    @property
    def is_known(self) -> bool:
        """Whether anything is known about costs."""
        return bool(self._known)

    def seconds(self, worker: Candidate, num_units: int) -> float:
        """How long so much work takes a worker, in seconds; in units while no cost is known."""
        if worker.cost.s_per_unit:
            return num_units * worker.cost.s_per_unit
        return num_units * (self._sum / len(self._known) if self._known else 1.0)

    def rank(self, worker: Candidate) -> Rank:
        """By its load."""
        return self.seconds(worker, worker.load_units), worker.num_tasks

    def chosen(self, worker: Candidate, keys: Sequence[str]) -> None:
        """Nothing to note: only loads count."""

    def favourite(self, keys: Sequence[str]) -> str | None:
        """Nobody."""
        return None

    def is_worth(self, favourite: Candidate, best: Candidate, num_units: int) -> bool:
        """Never."""
        return False


class RoundRobin(LeastLoaded):
    """The worker that has gone longest without being given work."""

    passes_by = True

    def __init__(self) -> None:
        super().__init__()
        self._turns = itertools.count(1)
        self._last: dict[str, int] = {}

    def rank(self, worker: Candidate) -> Rank:
        """By when it was last given something."""
        return (self._last.get(worker.peer_id, 0),)

    def chosen(self, worker: Candidate, keys: Sequence[str]) -> None:
        """It has had its turn."""
        self._last[worker.peer_id] = next(self._turns)

    def gone(self, worker: Candidate) -> None:
        """A worker has left the stage."""
        super().gone(worker)
        self._last.pop(worker.peer_id, None)


class Affine(LeastLoaded):
    """The worker that has had the same patches or beginnings of prompts before, unless it is much busier than others.

    Its caches save work. It is taken as long as its extra load, compared with the least loaded worker, takes no longer
    than the new work would take there.
    """

    def __init__(self) -> None:
        super().__init__()
        self._holders: OrderedDict[str, str] = OrderedDict()

    def chosen(self, worker: Candidate, keys: Sequence[str]) -> None:
        """The worker has these now."""
        for key in keys:
            self._holders[key] = worker.peer_id
            self._holders.move_to_end(key)
        while len(self._holders) > _MAX_KNOWN:
            self._holders.popitem(last=False)

    def favourite(self, keys: Sequence[str]) -> str | None:
        """The worker that was last given the most specific known key: keys go from general to specific."""
        return next((found for key in reversed(keys) if (found := self._holders.get(key))), None)

    def is_worth(self, favourite: Candidate, best: Candidate, num_units: int) -> bool:
        """Whether waiting there costs no more than doing the work elsewhere."""
        more_s = self.seconds(favourite, favourite.load_units) - self.seconds(best, best.load_units)
        return more_s <= self.seconds(best, num_units)


CHOICES: dict[str, Callable[[], LeastLoaded]] = {
    "least_loaded": LeastLoaded,
    "round_robin": RoundRobin,
    "affine": Affine,
}

"""The workers of one stage that take new work, kept sorted for whoever chooses among them. Pure.

A part of the decision core; the rules are in `broker.policies.choice`. Rank and room are two things: rank says who
should get the work, room who can take it. The least loaded worker need not be the one with the most room where workers
differ in size or speed.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Collection, Iterator, Sequence

from broker.policies.choice import Candidate, LeastLoaded, Rank, Takes

# So many workers are looked at by rank before those with the most room are: without a bound, a request that fits almost
# nowhere would look at all of them.
_MAX_LOOKS = 16


class Ranking:
    """Workers by rank, then by arrival. Changes and look-ups cost O(log n) comparisons."""

    def __init__(self) -> None:
        self._order: list[tuple[Rank, int, Candidate]] = []
        self._entries: dict[str, tuple[Rank, int, Candidate]] = {}

    def __len__(self) -> int:
        return len(self._order)

    def __iter__(self) -> Iterator[Candidate]:
        return (entry[2] for entry in self._order)

    @property
    def first(self) -> Candidate | None:
        """The one with the lowest rank."""
        return self._order[0][2] if self._order else None

    def rank_of(self, worker: Candidate) -> Rank | None:
        """The rank under which a worker is listed."""
        entry = self._entries.get(worker.peer_id)
        return entry[0] if entry else None

    def put(self, worker: Candidate, rank: Rank, number: int) -> None:
        """Adds a worker, or gives it another rank."""
        before = self._entries.get(worker.peer_id)
        if before is not None:
            if before[0] == rank:
                return
            del self._order[bisect.bisect_left(self._order, before)]
        entry = self._entries[worker.peer_id] = (rank, number, worker)
        bisect.insort(self._order, entry)

    def drop(self, worker: Candidate) -> None:
        """Takes a worker out; nothing happens if it is not here."""
        entry = self._entries.pop(worker.peer_id, None)
        if entry is not None:
            del self._order[bisect.bisect_left(self._order, entry)]


class StageWorkers:
    """The workers of one stage that take new work, sorted for a choice: on all hosts, on each host, and by room.

    Args:
        choice: ranks them.
        touched: each worker whose load has changed is added to it, by id.
    """

    def __init__(self, choice: LeastLoaded, touched: dict[str, Candidate] | None = None) -> None:
        self.choice = choice
        self._touched: dict[str, Candidate] = {} if touched is None else touched
        self._numbers = itertools.count()
        self._known: dict[str, tuple[int, Candidate]] = {}
        self._everywhere = Ranking()
        self._by_host: dict[str, Ranking] = {}
        self._by_room = Ranking()
        self._have_room = False  # whether any of them was ever listed by room: encode workers are not

    def __len__(self) -> int:
        return len(self._known)

    def __iter__(self) -> Iterator[Candidate]:
        """In the order they came."""
        return (worker for _, worker in self._known.values())

    def __contains__(self, peer_id: object) -> bool:
        return peer_id in self._known

    def add(self, worker: Candidate) -> None:
        """A worker takes work of this stage from now on."""
        self._known[worker.peer_id] = next(self._numbers), worker
        if worker.cost.s_per_unit:
            self.learnt(worker)
        self.update(worker)

    def remove(self, worker: Candidate) -> None:
        """A worker takes no more work of this stage; nothing happens if it took none."""
        if self._known.pop(worker.peer_id, None) is None:
            return
        self.choice.gone(worker)
        self._everywhere.drop(worker)
        self._by_room.drop(worker)
        here = self._by_host[worker.host]
        here.drop(worker)
        if not here:
            del self._by_host[worker.host]

    def update(self, worker: Candidate) -> None:
        """A worker's load has changed; one that takes no new work has no rank."""
        self._touched[worker.peer_id] = worker
        known = self._known.get(worker.peer_id)
        if known is None:
            return
        number, rank = known[0], self.choice.rank(worker)
        self._everywhere.put(worker, rank, number)
        here = self._by_host.get(worker.host)
        if here is None:
            here = self._by_host[worker.host] = self._everywhere if not self._by_host else self._split(worker.host)
        if here is not self._everywhere:
            here.put(worker, rank, number)
        room = worker.room_units
        if room or self._have_room:
            self._have_room = True
            self._by_room.put(worker, (-room,), number)

    def _split(self, host: str) -> Ranking:
        """Workers of a second host have come: from now on each host has a ranking of its own.

        Until then the only host shares the ranking of all, so that one host, the usual case, is not sorted twice.
        """
        for other, ranking in self._by_host.items():
            if ranking is self._everywhere:
                mine = self._by_host[other] = Ranking()
                for number, worker in self._known.values():
                    if worker.host == other:
                        mine.put(worker, self.choice.rank(worker), number)
        return Ranking()

    def learnt(self, worker: Candidate) -> None:
        """The cost of a worker's work has changed; the first known cost changes all ranks, from units to seconds."""
        if worker.peer_id not in self._known:
            return
        was_known = self.choice.is_known
        self.choice.learnt(worker)
        for _, one in self._known.values() if not was_known else (self._known[worker.peer_id],):
            self.update(one)

    def give(self, worker: Candidate, keys: Sequence[str] = ()) -> None:
        """A worker was given work: `choice` takes note, and its rank is renewed."""
        self.choice.chosen(worker, keys)
        self.update(worker)

    @property
    def most_room(self) -> int:
        """The most that any of the workers can be given now."""
        first = self._by_room.first
        return first.room_units if first else 0

    def has_host(self, host: str) -> bool:
        """Whether any of them is on a host."""
        return host in self._by_host

    def first_on(self, host: str, takes: Takes) -> Candidate | None:
        """The one with the lowest rank on a host; if the choice passes others by, of those that can take the work."""
        here = self._by_host.get(host)
        return self._first(iter(here), takes) if here else None

    def first_except(self, hosts: Collection[str], takes: Takes) -> Candidate | None:
        """As `first_on`, of those that are on none of `hosts`."""
        if not hosts:
            return self._first(iter(self._everywhere), takes)
        return self._first((worker for worker in self._everywhere if worker.host not in hosts), takes)

    def _first(self, ranking: Iterator[Candidate], takes: Takes) -> Candidate | None:
        if not self.choice.passes_by:
            return next(ranking, None)
        return next((one for one in itertools.islice(ranking, _MAX_LOOKS) if takes(one)), None)

    def is_as_good(self, worker: Candidate, other: Candidate) -> bool:
        """Whether two of them have the same rank."""
        return self._everywhere.rank_of(worker) == self._everywhere.rank_of(other)

    def best(
        self,
        takes: Takes,
        *,
        host: str | None = None,
        keys: Sequence[str] = (),
        num_units: int = 0,
    ) -> Candidate | None:
        """The worker for a piece of work: the favourite if that is worth it, else the one with the lowest rank.

        Args:
            takes: whether a worker can take it now.
            host: only workers of this host; None for all.
            keys: what the work is about, from general to specific (`Choice.favourite`).
            num_units: how much work it is.

        Returns:
            None if nobody can take it now. If many workers of different sizes are nearly full, one that could take it
            may be overlooked.
        """
        ranking = self._everywhere if host is None else self._by_host.get(host)
        if ranking is None:
            return None
        best = next((one for one in itertools.islice(ranking, _MAX_LOOKS) if takes(one)), None)
        if best is None and len(ranking) > _MAX_LOOKS:
            roomy = (one for one in self._by_room if host is None or one.host == host)
            best = next((one for one in itertools.islice(roomy, _MAX_LOOKS) if takes(one)), None)
        favourite = self.choice.favourite(keys) if keys and best is not None else None
        if best is None or favourite is None or favourite not in self._known:
            return best
        _, other = self._known[favourite]
        if (host is None or other.host == host) and takes(other) and self.choice.is_worth(other, best, num_units):
            return other
        return best

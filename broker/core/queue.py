"""The requests that wait for a place: in line, or for a moment after they have lost a worker. Pure.

Part of the decision core; fair among tenants (`broker.policies.fairness`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from broker.core.liveness import MEDIA, TEXT
from broker.core.request import Leg, Request
from broker.core.timers import Timers
from broker.core.wake import Wake
from broker.policies.fairness import FairQueue
from broker.policies.order import Order, Waiting

# Of the requests that were put back, those with slots go first: others might be waiting for these very slots.
_HOLDS_SLOTS, _HOLDS_NONE = 0.0, 1.0


def kind_of(request: Request) -> str:
    """What a request cannot start without (`broker.core.liveness.NEEDED`)."""
    return MEDIA if request.patches else TEXT


class RequestQueue:
    """All requests that are QUEUED.

    Args:
        order: which of a tenant's requests is next.
        holds_slots: whether a leg holds slots.
        delays: for those that pause before they stand in line again.
        wake: told when another request may be the head.
    """

    def __init__(self, order: Order, holds_slots: Callable[[Leg], bool], delays: Timers, wake: Wake) -> None:
        self._order, self._holds_slots, self._delays, self._wake = order, holds_slots, delays, wake
        self._line: FairQueue[str] = FairQueue(knows_longest=True)
        self._resting: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._line) + len(self._resting)

    def __iter__(self) -> Iterator[str]:
        yield from self._line
        yield from self._resting

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._line or request_id in self._resting

    def put(self, request: Request) -> None:
        """Adds a new request to its tenant's line."""
        key = self._order(Waiting(request.cost, request.deadline_at))
        self._line.push(request.submit.tenant, request.request_id, request.cost, needs=kind_of(request), key=key)
        self._wake.arrived()

    def put_back(self, request: Request, not_before: float, now: float) -> None:
        """A request that has had its turn goes before all that have not, from `not_before` on."""
        if not_before <= now:
            self._put_first(request)
            return
        self._resting[request.request_id] = request
        self._delays.set(not_before, lambda _: self._rested(request))

    def _rested(self, request: Request) -> None:
        if self._resting.get(request.request_id) is request:
            del self._resting[request.request_id]
            self._put_first(request)

    def _put_first(self, request: Request) -> None:
        key = _HOLDS_SLOTS if self._holds_slots(request.leg) else _HOLDS_NONE
        self._line.push_front(request.submit.tenant, request.request_id, needs=kind_of(request), key=key)
        self._wake.changed()

    def lost_slots(self, request: Request) -> None:
        """A waiting request no longer holds slots."""
        if request.request_id in self._line:
            self._put_first(request)

    def remove(self, request_id: str) -> None:
        """A request no longer waits; nothing happens if it did not."""
        self._resting.pop(request_id, None)
        if request_id in self._line:
            self._line.remove(request_id)
            self._wake.changed()

    def next(self, blocked: Collection[str]) -> str | None:
        """The request whose turn it is, among those whose kind is not `blocked`."""
        return self._line.next(blocked)

    def take(self, request_id: str) -> None:
        """Takes out the request that `next` gave: it has started."""
        self._line.take(request_id)

    def of_kind(self, kind: str, requests: dict[str, Request]) -> list[Request]:
        """All waiting requests that need the same things."""
        resting = [request for request in self._resting.values() if kind_of(request) == kind]
        return [*(requests[request_id] for request_id in self._line.waiting(kind)), *resting]

    def count(self, tenant: str) -> int:
        """How many requests of a tenant wait for their first turn."""
        return self._line.count(tenant)

    def newest_of_longest(self) -> tuple[str, str] | None:
        """The tenant with the most requests that wait for their first turn, and the newest of them."""
        return self._line.newest_of_longest()

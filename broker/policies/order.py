"""Which request or patch of a tenant is next. Pure.

Chosen by name in the configuration, one for requests and one for patches. Fair sharing among tenants
(`broker.policies.fairness`) stays on top of any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Waiting(NamedTuple):
    """What an order may look at: how much work it is (tokens), and when it must be done (the core's clock, seconds)."""

    cost: float
    deadline_at: float


# The lowest goes first; of equals, the one that came first.
Order = Callable[[Waiting], float]


def first_come_first_served(waiting: Waiting) -> float:
    """In the order of arrival."""
    return 0.0


def shortest_job_first(waiting: Waiting) -> float:
    """The least work first; large work may wait for long while small work keeps arriving."""
    return waiting.cost


def earliest_deadline_first(waiting: Waiting) -> float:
    """The earliest deadline first."""
    return waiting.deadline_at


ORDERS: dict[str, Order] = {
    "fcfs": first_come_first_served,
    "sjf": shortest_job_first,
    "edf": earliest_deadline_first,
}

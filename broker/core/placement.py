"""Which prefill and which decode worker a request gets, and how much room it takes there. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

from broker.core.peers import Stages, Worker
from broker.core.wake import Room
from broker.policies.choice import Candidate
from epd.messages import Stage


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """The workers chosen for a request, and the KV tokens set aside for it on the decode worker, if it needs one."""

    prefill: Worker
    decode: Worker | None
    reserved_tokens: int


def place(
    stages: Stages,
    num_tokens: int,
    num_outputs: int,
    *,
    needs_decode: bool = True,
    host: str | None = None,
    affinity: Sequence[str] = (),
) -> Placement | Room:
    """The prefill and the decode worker for a request, as the stages' choices decide; or what it lacks.

    Args:
        stages: the workers that take new work.
        num_tokens: its prompt, with the output of earlier legs.
        num_outputs: the output to set KV tokens aside for.
        needs_decode: whether it needs a decode worker.
        host: the only host whose prefill workers can read what the cache already has for it; None for all.
        affinity: what the work is about (`broker.policies.choice`).

    A decode worker has room if its KV cache holds all tokens that it was promised and its batch has a place: then its
    side of a KV push is always registered at once, and a finished prefill never waits for memory there. An idle worker
    takes any request that fits at all, even if its output might outgrow it later. If no decode worker is needed, the
    same holds for the prefill worker: what it cannot take at once waits its turn in the broker.
    """
    need = num_tokens + num_outputs

    def fits(worker: Candidate) -> bool:
        return num_tokens + 1 <= cast(Worker, worker).info.kv_capacity_tokens

    def has_room(worker: Candidate) -> bool:
        if not worker.num_tasks:
            return fits(worker)
        return need <= worker.room_units

    prefills, decodes = stages[Stage.PREFILL], stages[Stage.DECODE]
    host = host if host is not None and prefills.has_host(host) else None
    # A prefill worker may be given more than fits at once, as its engine queues the rest. One that gives the only token
    # of an answer is like a decode worker: what it cannot take now waits here, where another one may take it.
    takes = fits if needs_decode else has_room
    prefill = prefills.best(takes, host=host, keys=affinity, num_units=num_tokens)
    if prefill is None:
        return Room.PREFILL
    if not needs_decode:
        return Placement(cast(Worker, prefill), None, 0)
    if decodes.most_room < num_tokens + 1:  # spares a look at every worker while all are full
        return Room.DECODE
    decode = decodes.best(has_room, keys=affinity, num_units=need)
    return Placement(cast(Worker, prefill), cast(Worker, decode), need) if decode else Room.DECODE

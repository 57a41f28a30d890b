"""Whether the pipeline can answer, and what each daemon holds.

Lives in the endpoint process; pure. What it knows is the broker's last STATUS and
whether the link is registered.
"""

from __future__ import annotations

from typing import Any

import msgspec

from epd.messages import Stage, Status, WorkerStatus


class View(msgspec.Struct, frozen=True, kw_only=True):
    """What the endpoint `name` sees of the pipeline at one moment; `held` is what it holds itself."""

    registered: bool
    draining: bool
    warming: bool = False
    num_in_flight: int
    status: Status | None
    name: str = ""
    held: dict[str, int] = {}


def num_workers(status: Status | None) -> dict[str, int]:
    """The number of workers of each stage; zero if there is no status."""
    stages = [worker.stage for worker in status.workers] if status is not None else []
    return {str(stage): stages.count(stage) for stage in Stage}


def missing(view: View) -> list[str]:
    """What keeps the pipeline from answering, in words; empty if nothing does."""
    reasons = []
    if view.draining:
        reasons.append("this endpoint is shutting down")
    if not view.registered:
        reasons.append("no registration with the broker")
    elif view.status is None:
        reasons.append("no status from the broker yet")
    else:
        counts = num_workers(view.status)
        reasons += [f"no {stage} worker" for stage, count in counts.items() if not count]
        if not view.status.num_pools:
            reasons.append("no pool for embeddings")
    if not reasons and view.warming:
        reasons.append("the first requests, which this endpoint sends itself, are under way")
    return reasons


def describe(view: View) -> dict[str, Any]:
    """The JSON of /ready."""
    reasons = missing(view)
    members = [] if view.status is None else [describe_worker(worker) for worker in view.status.workers]
    return {"ready": not reasons, "missing": reasons, "workers": num_workers(view.status), "members": members}


def describe_worker(worker: WorkerStatus) -> dict[str, Any]:
    """One worker in the JSON of /ready.

    The byte counts are those of its parameters; `units` are what an encode worker has proved.
    """
    return {
        "name": worker.name,
        "stage": str(worker.stage),
        "host": worker.host,
        "num_outstanding": worker.num_outstanding,
        "num_done": worker.num_done,
        "draining": worker.draining,
        "tower_bytes": worker.info.tower_bytes,
        "language_bytes": worker.info.language_bytes,
        "kv_capacity_tokens": worker.info.kv_capacity_tokens,
        "units": worker.info.units,
        "start_s": round(worker.info.start_s, 2),
    }


def held_by_daemon(view: View) -> dict[str, dict[str, int]]:
    """What each daemon holds, by its name and kind: this endpoint now, the others as of their last heartbeats."""
    held = {view.name: view.held}
    if view.status is not None:
        held["broker"] = view.status.broker_held
        held |= {worker.name: worker.held for worker in view.status.workers}
        held |= {name: counts for name, counts in view.status.peers_held.items() if name != view.name}
    return held

"""The patches that wait to be encoded and those being encoded, and which worker gets which. Pure.

Tenants take turns, by the tokens of their patches; the order of one tenant's patches is a policy. Each patch goes to
the encode worker that the stage's choice prefers, by default the one with the least outstanding work: that spreads a
request's patches over all workers, so that its last patch is done soonest. A worker is given at most a few batches
ahead, so that what still waits here can go to whichever worker is free first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import cast

from broker.core.peers import Worker
from broker.core.stage_workers import StageWorkers
from broker.policies.choice import Candidate
from broker.policies.fairness import FairQueue
from broker.policies.order import Order, Waiting
from epd.messages import EncodeJob, Patch, Pool, Slot

# The class of patches whose pool every host reaches; those of other pools have the name of the host that reaches it.
ANYWHERE = ""


@dataclasses.dataclass(slots=True, eq=False)
class Job:
    """One patch to encode into one slot. `num_attempts` counts the workers that got it and that it may have harmed.

    `tenant` is the first one that wanted it, `deadline_at` when that one needs it at the latest; `near` is the host of
    its pool, and `where` the only host that reaches the pool (`ANYWHERE` if all do). `unstored` says how often the pool
    could not be reached, and since when.
    """

    job_id: int
    patch_hash: str
    modality: str
    num_tokens: int
    slot: Slot
    frames: Sequence[bytes]
    tenant: str
    deadline_at: float
    near: str = ""
    where: str = ANYWHERE
    worker: Worker | None = None
    num_attempts: int = 0
    dropped: bool = False
    unstored: tuple[int, float] = (0, 0.0)

    def message(self) -> EncodeJob:
        """The job as it is sent to its worker."""
        return EncodeJob(
            job_id=self.job_id,
            patch_hash=self.patch_hash,
            modality=self.modality,
            num_tokens=self.num_tokens,
            num_frames=len(self.frames),
            slot=self.slot,
        )


class EncodeQueue:
    """Jobs by id; those without a worker wait, in order.

    Args:
        batches_ahead: how many batches a worker is given ahead of its time.
        order: which of a tenant's patches is next.
        workers: the encode workers that take new work.
    """

    def __init__(self, batches_ahead: int, order: Order, workers: StageWorkers) -> None:
        self._batches_ahead, self._order, self._workers = batches_ahead, order, workers
        self._jobs: dict[int, Job] = {}
        self._waiting: FairQueue[int] = FairQueue()
        self._by_hash: dict[str, int] = {}
        self._pools: dict[str, Pool] = {}
        self._next_id = 1
        self._stuck: set[str] = set()  # the places whose next job waits for a worker to have room
        self._is_due = False

    def __len__(self) -> int:
        return len(self._jobs)

    def get(self, job_id: int) -> Job | None:
        """The job of that id, unless it has ended."""
        return self._jobs.get(job_id)

    def of_patch(self, patch_hash: str) -> Job | None:
        """The job that encodes this patch."""
        job_id = self._by_hash.get(patch_hash)
        return None if job_id is None else self._jobs.get(job_id)

    def waiting(self) -> Iterator[Job]:
        """All jobs that no worker has."""
        return (self._jobs[job_id] for job_id in self._waiting)

    # ---- what there is to do ---------------------------------------------------------------------------------------

    def add(self, patch: Patch, slot: Slot, frames: Sequence[bytes], tenant: str, deadline_at: float) -> Job:
        """Queues a patch; `dispatch` gives it to a worker."""
        job = Job(
            self._next_id, patch.patch_hash, patch.modality, patch.num_tokens, slot, frames, tenant, deadline_at
        )  # fmt: skip
        self._next_id += 1
        self._jobs[job.job_id] = job
        self._by_hash[job.patch_hash] = job.job_id
        self._locate(job)
        key = self._order(Waiting(job.num_tokens, deadline_at))
        self._waiting.push(tenant, job.job_id, job.num_tokens, needs=job.where, key=key)
        self._is_due = True
        return job

    def again(self, job: Job, slot: Slot) -> None:
        """Puts a job that its worker could not finish before all that have not been started, with a new slot."""
        job.slot, job.worker, job.dropped = slot, None, False
        self._locate(job)
        self._waiting.push_front(job.tenant, job.job_id, needs=job.where)
        self._is_due = True

    def end(self, job: Job) -> None:
        """Forgets a job that is done or no longer wanted."""
        self._jobs.pop(job.job_id, None)
        self._waiting.remove(job.job_id)
        if self._by_hash.get(job.patch_hash) == job.job_id:
            del self._by_hash[job.patch_hash]

    def _locate(self, job: Job) -> None:
        pool = self._pools.get(job.slot.pool_id)
        job.near = pool.host if pool else ""
        job.where = pool.host if pool and not pool.address else ANYWHERE

    # ---- what has changed ------------------------------------------------------------------------------------------

    def set_pools(self, pools: Sequence[Pool]) -> None:
        """The pools have changed."""
        self._pools = {pool.pool_id: pool for pool in pools}
        self.workers_changed()

    def workers_changed(self) -> None:
        """Workers have come or gone."""
        self._stuck.clear()
        self._is_due = True

    def left(self, worker: Worker) -> None:
        """A worker has less to do than before: jobs that wait for it may go on."""
        self._stuck.discard(worker.host)
        self._stuck.discard(ANYWHERE)
        self._is_due = True

    # ---- who gets what ---------------------------------------------------------------------------------------------

    def dispatch(self) -> Iterator[tuple[Job, Worker]]:
        """Assigns waiting jobs to workers and yields each pair, until none waits or all workers have enough.

        Of equally good workers, one on the host of the job's pool is taken; once the pool could not be reached from
        another host, one on its own host is taken in any case. A worker that cannot reach the pool gets the job only if
        none can, and reports that. If the workers that could take a job have enough, it waits and is not overtaken by
        jobs for the same workers; jobs for other workers go on.
        """
        if not self._is_due:
            return
        self._is_due = False
        while ANYWHERE not in self._stuck and (job_id := self._waiting.next(self._stuck)) is not None:
            job = self._jobs[job_id]
            worker = self._choose(job)
            if worker is None or not self._takes(worker, job):
                self._stuck.add(job.where if self._workers.has_host(job.where) else ANYWHERE)
                continue
            self._waiting.take(job_id)
            job.worker, job.num_attempts = worker, job.num_attempts + 1
            worker.jobs[job.job_id] = job
            worker.embeddings_to_encode += job.num_tokens
            self._workers.give(worker)
            yield job, worker

    def _choose(self, job: Job) -> Worker | None:
        def takes(worker: Candidate) -> bool:
            return self._takes(cast(Worker, worker), job)

        near = None if job.near in self._stuck else self._workers.first_on(job.near, takes)
        if job.where != ANYWHERE and self._workers.has_host(job.where):
            return cast("Worker | None", near)
        best = self._workers.first_except(self._stuck, takes)
        is_better = near is not None and best is not None and near is not best
        if is_better and (job.unstored[0] or self._workers.is_as_good(near, best)):  # type: ignore[arg-type]
            best = near
        return cast("Worker | None", best)

    def _takes(self, worker: Worker, job: Job) -> bool:
        """Whether a worker may be given a job ahead of its time."""
        ahead = worker.info.max_batch_tokens * self._batches_ahead
        return not worker.jobs or worker.embeddings_to_encode + job.num_tokens <= ahead

"""The patches waiting to be encoded and the ones being encoded, and which worker gets which. Pure.

Tenants take turns by the tokens of their patches, and each tenant's are served first come, first served. Each patch
goes to the encode worker with the least outstanding work, which spreads one request's patches over all workers and gets
its last patch done soonest. A worker is given at most a few batches ahead, so that what waits here can still go to
whoever is free first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from broker.fairness import FairQueue
from broker.registry import Peer
from epd.messages import EncodeJob, Pool, Slot


@dataclasses.dataclass(slots=True, eq=False)
class Job:
    """One patch to encode into one slot. `num_attempts` counts the workers it has been given to and may have hurt.

    `tenant` is the first who wanted it; `unstored` says how often its pool could not be reached, and since when.
    """

    job_id: int
    patch_hash: str
    modality: str
    num_tokens: int
    slot: Slot
    frames: list[bytes]
    tenant: str = ""
    worker: str = ""
    num_attempts: int = 0
    sent_at: float = 0.0
    dropped: bool = False
    unstored: tuple[int, float] = (0, 0.0)

    def message(self) -> EncodeJob:
        """This job as its worker is told of it."""
        return EncodeJob(
            job_id=self.job_id,
            patch_hash=self.patch_hash,
            modality=self.modality,
            num_tokens=self.num_tokens,
            num_frames=len(self.frames),
            slot=self.slot,
        )


class EncodeQueue:
    """Jobs by id, in order; those without a worker wait."""

    def __init__(self, batches_ahead: int) -> None:
        self._batches_ahead = batches_ahead
        self._jobs: dict[int, Job] = {}
        self._waiting: FairQueue[int] = FairQueue()
        self._by_hash: dict[str, int] = {}
        self._next_id = 1

    def __len__(self) -> int:
        return len(self._jobs)

    def get(self, job_id: int) -> Job | None:
        """The job of that id, unless it has ended."""
        return self._jobs.get(job_id)

    def of_patch(self, patch_hash: str) -> Job | None:
        """The job that encodes this patch."""
        job_id = self._by_hash.get(patch_hash)
        return None if job_id is None else self._jobs.get(job_id)

    def add(
        self, patch_hash: str, modality: str, num_tokens: int, slot: Slot, frames: list[bytes], tenant: str = ""
    ) -> Job:
        """Queues a patch; `dispatch` gives it to a worker."""
        job = Job(self._next_id, patch_hash, modality, num_tokens, slot, frames, tenant)
        self._next_id += 1
        self._jobs[job.job_id] = job
        self._by_hash[patch_hash] = job.job_id
        self._waiting.push(tenant, job.job_id, num_tokens)
        return job

    def again(self, job: Job, slot: Slot) -> None:
        """Puts a job that its worker could not finish back before all that have not been started, with a new slot."""
        job.slot, job.worker, job.dropped = slot, "", False
        self._waiting.push_front(job.tenant, job.job_id)

    def end(self, job: Job) -> None:
        """Forgets a job that is done or not wanted any more."""
        self._jobs.pop(job.job_id, None)
        self._waiting.remove(job.job_id)
        if self._by_hash.get(job.patch_hash) == job.job_id:
            del self._by_hash[job.patch_hash]

    def dispatch(self, workers: list[Peer], pools: Mapping[str, Pool], now: float) -> Iterator[tuple[Job, Peer]]:
        """Assigns waiting jobs to `workers` and yields each pair, until none waits or all workers have enough.

        Among equally loaded workers, one on the host of the job's pool is taken, and among all of them once the pool
        could not be reached from elsewhere; one that cannot reach the pool only where nobody can, and says so. Where
        the workers that a job can go to have enough, it waits and is not passed by others that they could do; those
        that only other workers can do go on.
        """
        stuck: set[str] = set()  # pools whose next job waits
        full: set[str] = set()  # the workers it waits for

        def goes_on(job_id: int) -> bool:
            return not stuck or self._jobs[job_id].slot.pool_id not in stuck

        while len(full) < len(workers) and (job_id := self._waiting.next(goes_on)) is not None:
            job = self._jobs[job_id]
            pool = pools.get(job.slot.pool_id)
            reach = [peer for peer in workers if pool is None or pool.reached_from(peer.host)] or workers
            far = {peer.peer_id for peer in reach if pool is not None and peer.host != pool.host}
            room = [peer for peer in reach if peer.peer_id not in full]
            worker = self._least_loaded(room, far, near_first=job.unstored[0] > 0)
            if worker is None or not self._takes(worker, job):
                stuck.add(job.slot.pool_id)
                full.update(peer.peer_id for peer in reach)
                continue
            self._waiting.take(job_id)
            job.worker, job.sent_at, job.num_attempts = worker.peer_id, now, job.num_attempts + 1
            worker.jobs.add(job.job_id)
            worker.load_tokens += job.num_tokens
            yield job, worker

    @staticmethod
    def _least_loaded(workers: list[Peer], far: set[str], *, near_first: bool) -> Peer | None:
        def order(peer: Peer) -> tuple[bool, int, bool]:
            is_far = peer.peer_id in far
            return near_first and is_far, peer.load_tokens, is_far

        return min(workers, key=order, default=None)

    def _takes(self, worker: Peer, job: Job) -> bool:
        """Whether a worker may be given a job ahead of its time."""
        ahead = worker.info.max_batch_tokens * self._batches_ahead
        return not worker.jobs or worker.load_tokens + job.num_tokens <= ahead

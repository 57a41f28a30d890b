"""The patches of all requests: which are in the cache, which are being encoded, who waits for them. Pure.

Joins the cache's index with the encode queue. It decides nothing about requests: it answers with hashes, slots and
holders, and other parts of the core tell the workers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, cast

from broker.core.encoding import EncodeQueue, Job
from broker.core.holders import Holder
from broker.core.peers import Worker
from broker.core.pixels import PixelStore
from broker.core.request import Request
from broker.core.stage_workers import StageWorkers
from broker.policies.order import Order
from cache.index import Acquired, CacheIndex, Outcome, PatchNeed
from epd.config import BrokerConfig
from epd.messages import EncodedJob, EncodeFailed, Patch, PatchReady, Pool, WorkerInfo

MAX_ENCODE_ATTEMPTS = 2
# A patch is given up when it could not be stored, or was not found in its slot, more than MAX_MISSES times, over
# MISSES_FOR times as long as a lost peer takes to be noticed: before that, the pool's host may just be about to be
# lost.
MAX_MISSES, MISSES_FOR = 3, 2.0
# How long a lost encode worker is taken to be able to write still, if its name does not come back before.
QUARANTINE_S = 60.0
_COST_WEIGHT = 0.1


class UnknownModalityError(ValueError):
    """No encode worker encodes this modality."""


class PixelsNeededError(LookupError):
    """Patches that are not in the cache came without their pixels, and nobody else has brought them."""


@dataclasses.dataclass(frozen=True, slots=True)
class Lost:
    """A patch that will not be encoded for its present holders, and why.

    They may try `again` if the patch is not at fault; otherwise they fail.
    """

    patch_hash: str
    holders: tuple[Holder, ...]
    reason: str
    again: bool = False


class Done(NamedTuple):
    """A patch that can be read now, and who holds it."""

    patch_hash: str
    holders: tuple[Holder, ...]


class Patches:
    """The cache index and the encode queue behind it.

    Args:
        config: bounds and times.
        first_generation: where slot generations start; above any that earlier brokers can have used.
        order: which of a tenant's patches is encoded next.
        workers: the encode workers that take new work.
        freed: called when slots may have become free.

    Attributes:
        encode_info: what the newest encode worker said of itself; None before the first.
        quarantined: the name of the lost encode worker that may still write to a slot, by the slot's generation.
    """

    def __init__(
        self,
        config: BrokerConfig,
        first_generation: int,
        order: Order,
        workers: StageWorkers,
        freed: Callable[[], None],
    ) -> None:
        self.index = CacheIndex(first_generation)
        self.queue = EncodeQueue(config.encode_batches_ahead, order, workers)
        self.pixels = PixelStore(config.pixel_store_bytes)
        self.encode_info: WorkerInfo | None = None
        self.quarantined: dict[int, str] = {}
        self._workers, self._freed = workers, freed
        self._pools: dict[str, Pool] = {}
        self._by_host: dict[str, str] = {}
        self._cost_s: dict[str, float] = {}
        self._hopeless_after_s = MISSES_FOR * config.lost_after_s
        self.num_encoded = 0
        self.encode_s_saved = 0.0

    # ---- pools -----------------------------------------------------------------------------------------------------

    def add_pool(self, pool: Pool) -> None:
        """An empty pool has come; nothing happens if it is known already."""
        if pool.pool_id not in self._pools:
            self.index.add_pool(pool)
            self._pools_changed()

    def pool_lost(self, pool: Pool) -> list[Lost]:
        """A pool is gone with everything in it."""
        holders = {patch_hash: self.holders(patch_hash) for patch_hash in self.index.in_pool(pool.pool_id)}
        lost = []
        for patch_hash in self.index.remove_pool(pool.pool_id):
            job = self.queue.of_patch(patch_hash)
            if job and not job.worker:
                self.queue.end(job)
            if holders[patch_hash]:
                lost.append(Lost(patch_hash, holders[patch_hash], "its pool was lost with the cache daemon", True))
        self._pools_changed()
        return lost

    def _pools_changed(self) -> None:
        self._pools = {pool.pool_id: pool for pool in self.index.pools}
        self._by_host = {pool.host: pool.pool_id for pool in reversed(self.index.pools)}
        self.queue.set_pools(self.index.pools)
        self._freed()

    @property
    def has_pools(self) -> bool:
        """Whether there is any pool."""
        return bool(self._pools)

    def pool_near(self, host: str) -> str | None:
        """The pool on a host; the first that came if there are several."""
        return self._by_host.get(host)

    def only_host(self, patch_hashes: Iterable[str]) -> str | None:
        """The only host whose processes can read what the cache already has of these patches; None if all can.

        Also None if different hosts would be needed: then nobody can read everything.
        """
        hosts = set()
        for patch_hash in patch_hashes:
            slot = self.index.slot(patch_hash)
            pool = self._pools.get(slot.pool_id) if slot is not None else None
            if pool is not None and not pool.address:
                hosts.add(pool.host)
        return hosts.pop() if len(hosts) == 1 else None

    # ---- acquiring -------------------------------------------------------------------------------------------------

    def needs(self, patches: Iterable[Patch], info: WorkerInfo) -> list[PatchNeed]:
        """What `patches` need in the cache, with the widths of an encode worker.

        Raises:
            UnknownModalityError: it has no width for one of them.
        """
        needs = []
        for patch in patches:
            width = info.widths.get(patch.modality)
            if not width:
                raise UnknownModalityError(f"the encode workers do not encode {patch.modality!r}")
            cost_s = self._cost_s.get(patch.modality, 0.0) * patch.num_tokens
            needs.append(PatchNeed(patch.patch_hash, patch.num_tokens, width, info.dtype, cost_s))
        return needs

    def acquire(
        self,
        holder: Holder,
        patches: Mapping[str, Patch],
        frames: Mapping[str, Sequence[bytes]],
        needs: list[PatchNeed],
        *,
        deadline_at: float,
        prefer_pool: str | None = None,
        tenant: str = "",
    ) -> list[Acquired] | None:
        """Pins all patches for `holder` and queues the missing ones, or does nothing and returns None.

        Args:
            holder: who pins them, until `release`.
            patches: the patches by hash.
            frames: their pixels by hash; a patch without any must be in the cache, or its pixels in the store.
            needs: what they need, from `needs`.
            deadline_at: when the holder needs them at the latest.
            prefer_pool: where new patches go as long as there is room: near the worker that will read them.
            tenant: who is charged for encoding what is missing.

        Raises:
            PixelsNeededError: a patch would have to be encoded, and there are no pixels; nothing has changed.
            ValueError: a patch is known under its hash with another shape.
        """
        self.pixels.put(frames)
        acquired = self.index.acquire_all(needs, holder, prefer_pool=prefer_pool)
        if acquired is None:
            return None
        new = {item.patch_hash: item.slot for item in acquired if item.outcome is Outcome.NEW}
        found = {patch_hash: self.pixels.get(patch_hash, frames) for patch_hash in new}
        if not all(found.values()):
            self.index.release(holder)
            for patch_hash, slot in new.items():
                self.index.drop(patch_hash, slot.generation)
            raise PixelsNeededError(f"{len(new)} patches are not in the cache and came without pixels")
        for patch_hash, slot in new.items():
            self.queue.add(patches[patch_hash], slot, found[patch_hash], tenant, deadline_at)
        for item in acquired:
            if item.outcome is not Outcome.NEW:
                patch = patches[item.patch_hash]
                self.encode_s_saved += self._cost_s.get(patch.modality, 0.0) * patch.num_tokens
        return acquired

    def observe(self, jobs: Iterable[Job], took_s: float) -> None:
        """Learns what encoding costs per token, from a batch of jobs that took `took_s`."""
        batch = list(jobs)
        num_tokens = sum(job.num_tokens for job in batch)
        if num_tokens:
            modality, cost_s = batch[0].modality, took_s / num_tokens
            before = self._cost_s.get(modality, cost_s)
            self._cost_s[modality] = before + _COST_WEIGHT * (cost_s - before)

    def dispatch(self) -> Iterator[tuple[Job, Worker]]:
        """Assigns waiting patches to encode workers; yields each pair."""
        return self.queue.dispatch()

    # ---- what encode workers say -----------------------------------------------------------------------------------

    def encoded(self, worker: Worker, said: Iterable[EncodedJob]) -> list[Done | None]:
        """A worker says that patches are in their slots.

        Returns:
            For each, who can read it; None if that is not, or no longer, true of its generation.
        """
        done: list[Done | None] = []
        for one in said:
            job = self.queue.get(one.job_id)
            if job is None or job.worker is not worker:
                done.append(None)
                continue
            self._take_off(worker, job)
            self.queue.end(job)
            if not self.index.commit(job.patch_hash, one.generation, worker.info.owner):
                done.append(None)
                continue
            self.num_encoded += 1
            holders = self.holders(job.patch_hash)
            if not holders:
                self._freed()
            done.append(Done(job.patch_hash, holders))
        self._has_room(worker)
        return done

    def hopeless(self, misses: int, since: float, now: float) -> bool:
        """Whether to give up a patch that could not be stored or read `misses` times since then."""
        return misses > MAX_MISSES and now - since > self._hopeless_after_s

    def not_encoded(self, worker: Worker, message: EncodeFailed, now: float) -> Lost | None:
        """A worker could not encode a patch: no other is tried, since the input is to blame.

        If `dropped`, it was not started, either on request or because its worker is draining: it is queued again if it
        is wanted. So it is, for a while, if `unstored`: its pool's host may answer again.
        """
        job = self._of(worker, message.job_id)
        if job is None:
            return None
        self._take_off(worker, job)
        self._has_room(worker)
        if not self.index.is_current(job.patch_hash, job.slot.generation):
            self.queue.end(job)  # its pool is gone
            return None
        holders, reason = self.holders(job.patch_hash), message.message
        again = message.dropped or job.dropped
        if message.unstored:
            misses, since = job.unstored if job.unstored[0] else (0, now)
            misses += 1
            job.unstored = misses, since
            again = not self.hopeless(misses, since, now)
            reason = f"it could not be stored, {misses} times: {reason}"
        if again and holders:
            job.num_attempts -= 1  # the patch is not at fault
            self.queue.again(job, job.slot)
            return None
        self.queue.end(job)
        self.index.drop(job.patch_hash, job.slot.generation)
        self._freed()
        return Lost(job.patch_hash, holders, reason) if holders else None

    def worker_lost(self, worker: Worker) -> tuple[list[Lost], list[int]]:
        """An encode worker is gone: its patches go to others, unless they have been tried often enough.

        A worker that was draining has left in good order: no patch is to blame for that.

        Returns:
            The patches that are lost, and the generations whose slots are out of use, as it might still write there.
        """
        lost: list[Lost] = []
        quarantined = []
        jobs, worker.jobs, worker.embeddings_to_encode = list(worker.jobs.values()), {}, 0
        for job in jobs:
            job.worker = None
            if not self.index.is_current(job.patch_hash, job.slot.generation):
                self.queue.end(job)  # its pool is gone
                continue
            self.quarantined[job.slot.generation] = worker.name
            quarantined.append(job.slot.generation)
            lost += self._again_elsewhere(job, worker)
        return lost, quarantined

    def _again_elsewhere(self, job: Job, worker: Worker) -> Iterator[Lost]:
        """Queues a lost worker's job again, with another slot, if it is wanted and may be tried again."""
        holders, generation = self.holders(job.patch_hash), job.slot.generation
        job.num_attempts -= worker.draining
        if not holders:
            self.index.drop(job.patch_hash, generation, quarantine=True)
            self.queue.end(job)
        elif job.num_attempts >= MAX_ENCODE_ATTEMPTS:
            self.queue.end(job)
            self.index.drop(job.patch_hash, generation, quarantine=True)
            yield Lost(job.patch_hash, holders, f"{job.num_attempts} encode workers were lost with this patch")
        elif slot := self.index.renew(job.patch_hash, generation, quarantine=True):
            self.queue.again(job, slot)
        else:
            self.queue.end(job)
            yield Lost(job.patch_hash, holders, "its encode worker was lost and the cache is full", True)

    def stale(self, request: Request, patch_hash: str, generation: int) -> Lost | None:
        """A reader found something else in the slot: encode the patch again from this request's frames."""
        if not self.index.is_current(patch_hash, generation):
            return None
        patch, frames = request.patches.get(patch_hash), self.pixels.get(patch_hash, request.patch_frames)
        holders = self.holders(patch_hash)
        slot = self.index.renew(patch_hash, generation) if patch and frames else None
        if patch is None or slot is None:
            self.index.drop(patch_hash, generation)
            self._freed()
            return Lost(patch_hash, holders, "its slot was overwritten and it cannot be encoded again")
        self.queue.add(patch, slot, frames, request.submit.tenant, request.deadline_at)
        return None

    def release(self, holder: Holder) -> list[Job]:
        """Unpins what `holder` held; returns the jobs at workers that nobody waits for now, to be dropped."""
        if not self.index.holds(holder):
            return []
        unwanted = []
        for patch_hash in self.index.release(holder):
            job = self.queue.of_patch(patch_hash)
            if job is None or self.index.holders(patch_hash):
                continue
            if job.worker:
                job.dropped = True
                unwanted.append(job)
            else:
                self.queue.end(job)
                self.index.drop(patch_hash, job.slot.generation)
        self._freed()
        return unwanted

    def lift_quarantine(self, generation: int) -> bool:
        """Frees memory that a lost encode worker might have written to: it is back, or has been gone for long."""
        if self.quarantined.pop(generation, None) is None or not self.index.lift_quarantine(generation):
            return False
        self._freed()
        return True

    def readable(self, patch_hashes: Iterable[str]) -> list[PatchReady]:
        """Those of `patch_hashes` that can be read now, with their slots."""
        return [
            PatchReady(patch_hash=patch_hash, slot=slot)
            for patch_hash in patch_hashes
            if (slot := self.index.readable(patch_hash)) is not None
        ]

    def holders(self, patch_hash: str) -> tuple[Holder, ...]:
        """Who pins a patch, in the order they came."""
        return cast("tuple[Holder, ...]", self.index.holders(patch_hash))

    def _of(self, worker: Worker, job_id: int) -> Job | None:
        job = self.queue.get(job_id)
        return job if job is not None and job.worker is worker else None

    @staticmethod
    def _take_off(worker: Worker, job: Job) -> None:
        """A worker no longer has a job."""
        del worker.jobs[job.job_id]
        worker.embeddings_to_encode -= job.num_tokens
        worker.num_done += 1
        job.worker = None

    def _has_room(self, worker: Worker) -> None:
        """A worker has less to do than before."""
        self._workers.update(worker)
        self.queue.left(worker)

"""The patches of all requests: which are in the cache, which are being encoded, who waits for them. Pure.

Joins the cache's index with the encode queue. It decides nothing about requests: it answers with hashes, slots and
holders, and the core tells the workers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

from broker.encoding import EncodeQueue, Job
from broker.pixels import PixelStore
from broker.registry import Peer
from broker.request import Request
from cache.index import Acquired, CacheIndex, Outcome, PatchNeed
from epd.messages import EncodeFailed, Patch, PatchReady, Pool, WorkerInfo

MAX_ENCODE_ATTEMPTS = 2
# A patch that could not be stored, or was not found in its slot, so often and for so many times as long as it takes to
# notice that a peer is lost, cannot be had through that pool.
MAX_MISSES, MISSES_FOR = 3, 2.0
QUARANTINE_S = 60.0
_COST_WEIGHT = 0.1


class UnknownModalityError(ValueError):
    """No encode worker encodes this modality."""


class PixelsNeededError(LookupError):
    """Patches that are not in the cache came without their pixels, and nobody else has brought them."""


@dataclasses.dataclass(frozen=True, slots=True)
class Lost:
    """A patch that will not be encoded for its present holders, and why.

    They may try `again` where it is no fault of the patch's; else they fail.
    """

    patch_hash: str
    holders: tuple[str, ...]
    reason: str
    again: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Done:
    """A patch that can be read now, and the requests that hold it."""

    patch_hash: str
    holders: tuple[str, ...]
    job: Job


class Patches:
    """The cache index and the encode queue behind it.

    Args:
        batches_ahead: how many batches an encode worker is given ahead.
        first_generation: where slot generations start; above all that earlier brokers can have given out.
        pixel_store_bytes: bound of the pixels kept for encoding a patch again.
        lost_after_s: how long it takes to notice that a peer is lost.
    """

    def __init__(self, batches_ahead: int, first_generation: int, pixel_store_bytes: int, lost_after_s: float) -> None:
        self.index = CacheIndex(first_generation)
        self.queue = EncodeQueue(batches_ahead)
        self.pixels = PixelStore(pixel_store_bytes)
        self._quarantined: dict[int, tuple[str, float]] = {}
        self._cost_s: dict[str, float] = {}
        self._lost_after_s = lost_after_s
        self.num_encoded = 0
        self.encode_s_saved = 0.0

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
        holder: str,
        patches: Mapping[str, Patch],
        frames: Mapping[str, list[bytes]],
        needs: list[PatchNeed],
        prefer_pool: str | None = None,
        tenant: str = "",
    ) -> list[Acquired] | None:
        """Pins all patches for `holder` and queues the missing ones, or does nothing and returns None.

        Args:
            holder: who pins them, until `release`.
            patches: the patches by hash.
            frames: their pixels by hash; a patch without any must be in the cache, or its pixels in the store.
            needs: what they need, from `needs`.
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
            patch = patches[patch_hash]
            self.queue.add(patch_hash, patch.modality, patch.num_tokens, slot, found[patch_hash], tenant)
        for item in acquired:
            if item.outcome is not Outcome.NEW:
                patch = patches[item.patch_hash]
                self.encode_s_saved += self._cost_s.get(patch.modality, 0.0) * patch.num_tokens
        return acquired

    def observe(self, jobs: Iterable[Job], took_s: float) -> None:
        """Learns what a token's encoding costs, from a batch of jobs that took `took_s`."""
        batch = list(jobs)
        num_tokens = sum(job.num_tokens for job in batch)
        if num_tokens:
            modality, cost_s = batch[0].modality, took_s / num_tokens
            before = self._cost_s.get(modality, cost_s)
            self._cost_s[modality] = before + _COST_WEIGHT * (cost_s - before)

    def dispatch(self, workers: list[Peer], now: float) -> Iterator[tuple[Job, Peer]]:
        """Assigns waiting patches to encode workers; yields each pair."""
        return self.queue.dispatch(workers, {pool.pool_id: pool for pool in self.index.pools}, now)

    def encoded(self, worker: Peer, job_id: int, generation: int) -> Done | None:
        """A worker says that a patch is in its slot; None when that is not (or no longer) true for this generation."""
        job = self._of(worker, job_id)
        if job is None:
            return None
        self._leave(worker, job)
        self.queue.end(job)
        if not self.index.commit(job.patch_hash, generation, worker.info.owner):
            return None
        self.num_encoded += 1
        return Done(job.patch_hash, self._holders(job.patch_hash), job)

    def hopeless(self, misses: int, since: float, now: float) -> bool:
        """Whether a patch that could not be stored or read `misses` times since then is given up."""
        return misses > MAX_MISSES and now - since > MISSES_FOR * self._lost_after_s

    def not_encoded(self, worker: Peer, message: EncodeFailed, now: float) -> Lost | None:
        """A worker could not encode a patch: nobody else is tried, since the input is to blame.

        If `dropped` it was not started: as asked, or because its worker is draining; it is queued again if wanted. So
        it is for a while if `unstored`, since its pool's host may answer again.
        """
        job = self._of(worker, message.job_id)
        if job is None:
            return None
        self._leave(worker, job)
        if not self.index.is_current(job.patch_hash, job.slot.generation):
            self.queue.end(job)  # its pool is gone
            return None
        holders, reason = self._holders(job.patch_hash), message.message
        again = message.dropped or job.dropped
        if message.unstored:
            misses, since = job.unstored if job.unstored[0] else (0, now)
            misses += 1
            job.unstored = misses, since
            again = not self.hopeless(misses, since, now)
            reason = f"it could not be stored, {misses} times: {reason}"
        if again and holders:
            job.num_attempts -= 1  # no fault of the patch's
            self.queue.again(job, job.slot)
            return None
        self.queue.end(job)
        self.index.drop(job.patch_hash, job.slot.generation)
        return Lost(job.patch_hash, holders, reason) if holders else None

    def worker_lost(self, worker: Peer, now: float) -> list[Lost]:
        """An encode worker is gone: its patches go to the others, unless they have been tried often enough.

        A worker that was draining has left in good order, which no patch is to blame for.
        """
        lost = []
        for job_id in sorted(worker.jobs):
            job = self.queue.get(job_id)
            if job is None or job.worker != worker.peer_id:
                continue
            if not self.index.is_current(job.patch_hash, job.slot.generation):
                self.queue.end(job)  # its pool is gone
                continue
            self._quarantined[job.slot.generation] = (worker.name, now + QUARANTINE_S)
            holders = self._holders(job.patch_hash)
            job.num_attempts -= worker.draining
            if not holders:
                self.index.drop(job.patch_hash, job.slot.generation, quarantine=True)
                self.queue.end(job)
            elif job.num_attempts >= MAX_ENCODE_ATTEMPTS:
                self.queue.end(job)
                self.index.drop(job.patch_hash, job.slot.generation, quarantine=True)
                reason = f"{job.num_attempts} encode workers were lost with this patch"
                lost.append(Lost(job.patch_hash, holders, reason))
            elif slot := self.index.renew(job.patch_hash, job.slot.generation, quarantine=True):
                self.queue.again(job, slot)
            else:
                self.queue.end(job)
                lost.append(Lost(job.patch_hash, holders, "its encode worker was lost and the cache is full", True))
        worker.jobs.clear()
        worker.load_tokens = 0
        return lost

    def reachable_by(self, readers: list[Peer], patch_hashes: Iterable[str]) -> list[Peer]:
        """Those of `readers` that can read what is in the cache already of these patches; all, where nobody can."""
        pools = {pool.pool_id: pool for pool in self.index.pools}
        there = {pools[slot.pool_id] for one in patch_hashes if (slot := self.index.slot(one)) is not None}
        return [peer for peer in readers if all(pool.reached_from(peer.host) for pool in there)] or readers

    def stale(self, request: Request, patch_hash: str, generation: int) -> Lost | None:
        """A reader found something else in the slot: encode the patch again from this request's frames."""
        if not self.index.is_current(patch_hash, generation):
            return None
        patch, frames = request.patches.get(patch_hash), self.pixels.get(patch_hash, request.patch_frames)
        holders = self._holders(patch_hash)
        slot = self.index.renew(patch_hash, generation) if patch and frames else None
        if patch is None or slot is None:
            self.index.drop(patch_hash, generation)
            return Lost(patch_hash, holders, "its slot was overwritten and it cannot be encoded again")
        self.queue.add(patch_hash, patch.modality, patch.num_tokens, slot, frames, request.submit.tenant)
        return None

    def release(self, holder: str) -> list[Job]:
        """Unpins what `holder` held; returns the jobs that now nobody waits for and that should be dropped."""
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
        return unwanted

    def pool_lost(self, pool: Pool) -> list[Lost]:
        """A pool is gone with all that was in it."""
        holders = {patch_hash: self._holders(patch_hash) for patch_hash in self.index.in_pool(pool.pool_id)}
        lost = []
        for patch_hash in self.index.remove_pool(pool.pool_id):
            job = self.queue.of_patch(patch_hash)
            if job and not job.worker:
                self.queue.end(job)
            if holders[patch_hash]:
                lost.append(Lost(patch_hash, holders[patch_hash], "its pool was lost with the cache daemon", True))
        return lost

    def lift_quarantine(self, name: str, now: float) -> None:
        """Frees the memory that a lost encode worker might have written to: it is back, or long gone."""
        for generation, (worker, until) in list(self._quarantined.items()):
            if worker == name or until <= now:
                del self._quarantined[generation]
                self.index.lift_quarantine(generation)

    def readable(self, patch_hashes: Iterable[str]) -> list[PatchReady]:
        """Those of `patch_hashes` that can be read now, with their slots."""
        return [
            PatchReady(patch_hash=patch_hash, slot=slot)
            for patch_hash in patch_hashes
            if (slot := self.index.readable(patch_hash)) is not None
        ]

    def _holders(self, patch_hash: str) -> tuple[str, ...]:
        """Who pins a patch, always in the same order: the core's decisions do not depend on hashing."""
        return tuple(sorted(self.index.holders(patch_hash)))

    def _of(self, worker: Peer, job_id: int) -> Job | None:
        job = self.queue.get(job_id)
        return job if job is not None and job.worker == worker.peer_id else None

    def _leave(self, worker: Peer, job: Job) -> None:
        worker.jobs.discard(job.job_id)
        worker.load_tokens -= job.num_tokens
        worker.num_done += 1
        job.worker = ""

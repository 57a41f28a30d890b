"""An encode worker in virtual time. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from broker.virtual.workers import StageWorker
from epd import messages as m
from epd.messages import EncodeJob, Message, Stage


class EncodeWorker(StageWorker):
    """Encodes what it is given in batches of at most `info.max_batch_tokens` rows, in order of arrival."""

    role = Stage.ENCODE

    def _reset(self) -> None:
        self._queue: dict[int, EncodeJob] = {}
        self._batch: list[EncodeJob] = []

    def holds(self) -> int:
        """Its patches."""
        return len(self._queue) + len(self._batch)

    def take(self, message: Message, frames: Sequence[bytes]) -> None:
        """Handles jobs, and drops of those that nobody wants any more."""
        if isinstance(message, m.Encode):
            self._queue |= {job.job_id: job for job in message.jobs}
            if self.draining:
                self._hand_back()
            self.wake()
        elif isinstance(message, m.DropEncode) and message.job_id in self._queue:
            del self._queue[message.job_id]
            self.say(m.EncodeFailed(job_id=message.job_id, message="dropped", dropped=True))

    def _hand_back(self) -> None:
        for job_id in self._queue:
            self.say(m.EncodeFailed(job_id=job_id, message="draining", dropped=True))
        self._queue = {}

    def _begin_step(self) -> float | None:
        num_rows = 0
        for job in self._queue.values():
            if self._batch and num_rows + job.num_tokens > self._info.max_batch_tokens:
                break
            self._batch.append(job)
            num_rows += job.num_tokens
        for job in self._batch:
            del self._queue[job.job_id]
        return self._costs.encode_s(len(self._batch), num_rows) if self._batch else None

    def _end_step(self, took_s: float) -> int:
        batch, self._batch = self._batch, []
        if batch:  # else the broker was lost meanwhile
            jobs = [m.EncodedJob(job_id=job.job_id, generation=job.slot.generation) for job in batch]
            self.say(m.Encoded(jobs=jobs, took_s=took_s))
        return sum(job.num_tokens for job in batch)

"""The encode stage: patches in, embeddings into their slots. Lives in an encode worker's engine thread."""

from __future__ import annotations

import time

from epd.messages import DropEncode, Encode, Encoded, EncodedJob, EncodeFailed, EncodeJob, Message, Stage
from workers.stage import Frames, StageRunner, ever_later

# How often to check whether slots are written, on another host or on a device: the first and the longest interval.
_STORE_POLL_S = (0.0005, 0.02)


class EncodeStage(StageRunner):
    """Encodes each patch as a separate engine request; vLLM batches those that wait together."""

    stage = Stage.ENCODE

    def start(self) -> None:
        """Builds the engine, and proves which pieces it can encode alone."""
        super().start()
        from workers.proving import prove_units, with_units

        self.info = with_units(self.info, prove_units(self.engine))
        self._jobs: dict[str, EncodeJob] = {}
        self._storing: dict[str, float] = {}  # jobs on their way to another host, and how long they took to encode
        self._num_unsettled = 0

    def handle(self, message: Message, frames: Frames) -> None:
        """Handles ENCODE and DROP_ENCODE."""
        match message:
            case Encode():
                at = 0
                for job in message.jobs:
                    self._add(job, frames[at : at + job.num_frames])
                    at += job.num_frames
            case DropEncode():
                name = str(message.job_id)
                if name not in self._storing and self._end(name):  # else it is reported as done
                    self.engine.abort([name])
                    self._post(EncodeFailed(job_id=message.job_id, message="dropped", dropped=True), ())

    def drain(self) -> None:
        """Hands back the jobs that have not been started."""
        super().drain()
        waiting = [name for name in self.engine.waiting() if name in self._jobs]
        self.engine.abort(waiting)
        for name in waiting:
            if job := self._end(name):
                self._hand_back(job)

    def _hand_back(self, job: EncodeJob) -> None:
        self._post(EncodeFailed(job_id=job.job_id, message="this worker is draining", dropped=True), ())

    def _add(self, job: EncodeJob, frames: Frames) -> None:
        if str(job.job_id) in self._jobs:
            return  # a dropped job may come again, under its old id
        if self.draining:
            self._hand_back(job)
            return
        try:
            name = self.engine.add_encode(job, frames)
        except Exception as error:  # whatever the engine raises for a patch fails that patch only
            self._post(EncodeFailed(job_id=job.job_id, message=_reason(error)), ())
        else:
            self._jobs[name] = job

    def step(self) -> bool:
        """Encodes waiting patches, as many as fit one batch, and reports each patch that is in its slot."""
        started = self.clock()
        outputs, executed = self.engine.step()
        written = self.engine.take_written()
        took_s = self.clock() - started
        num_new = len((written.done | written.storing) - self._storing.keys())
        share_s = {name: self._storing.get(name, took_s / max(1, num_new)) for name in written.done | written.storing}
        self._storing = {name: share_s[name] for name in written.storing}
        self._num_unsettled = written.num_unsettled
        done = [(share_s[name], job) for name in written.done if (job := self._end(name))]
        if executed or done:
            self.did(took_s if executed else 0.0, sum(job.num_tokens for _, job in done))
        if done:
            jobs = [EncodedJob(job_id=job.job_id, generation=job.slot.generation) for _, job in done]
            self._post(Encoded(jobs=jobs, took_s=sum(each_s for each_s, _ in done)), ())
        for name, reason in written.unstored.items():
            if job := self._end(name):
                self._post(EncodeFailed(job_id=job.job_id, message=reason, unstored=True), ())
        failed = dict(written.failed)
        failed |= {
            output.request_id: f"the engine ended with {output.finish_reason}"
            for output in outputs
            if output.finished and output.request_id in self._jobs and output.request_id not in self._storing | failed
        }
        for name, reason in failed.items():
            if job := self._end(name):
                self._post(EncodeFailed(job_id=job.job_id, message=reason), ())
        return executed

    def _end(self, name: str) -> EncodeJob | None:
        self.engine.connector.forget_job(name)
        return self._jobs.pop(name, None)

    def has_work(self) -> bool:
        """As in `StageRunner`; also while embeddings are on their way to another host, or copies have not run."""
        return super().has_work() or bool(self._storing or self._num_unsettled)

    def poll_s(self, num_idle_steps: int) -> float | None:
        """Writes under way are polled less and less often; otherwise a step only clears what has finished."""
        if self._storing or self._num_unsettled:
            return ever_later(_STORE_POLL_S, num_idle_steps)
        return 0.0 if num_idle_steps < 3 else 0.05

    def held(self) -> dict[str, int]:
        """As in `StageRunner`, plus the jobs that this stage knows."""
        return super().held() | {"requests": len(self._jobs)}

    def reset(self) -> None:
        """Drops all jobs."""
        self.engine.abort(list(self._jobs))
        for job in list(self._jobs):
            self._end(job)
        while self._storing:  # the next broker may use the same job ids
            time.sleep(_STORE_POLL_S[1])
            self._storing = dict.fromkeys(self.engine.take_written().storing, 0.0)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:500]

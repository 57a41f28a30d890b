"""The door of the decision core: messages in, messages out. Pure.

`Core.handle` takes one message from one peer, and `Core.tick` takes the time; both return what to send. The daemon
sends it; tests and the simulator call the core directly. Every accepted request ends with exactly one last output or
FAILED, or silently if its endpoint has cancelled it or is gone.

This module creates the parts, gives each only what it needs, and says which part handles which message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from broker.core.admission import Admission
from broker.core.answers import Answers
from broker.core.counts import Counts
from broker.core.encoding import Job
from broker.core.endings import Endings
from broker.core.fill import fills
from broker.core.holders import Holder
from broker.core.journal import Journal
from broker.core.legs import Legs
from broker.core.liveness import Liveness
from broker.core.membership import Membership
from broker.core.outbox import FrameLedger, Outbox, Send
from broker.core.patches import Patches
from broker.core.peers import Peer, Registry, Stages, Worker
from broker.core.progress import Progress, tell_lost
from broker.core.queue import RequestQueue
from broker.core.request import Request
from broker.core.retry import Retries
from broker.core.status import StatusBoard
from broker.core.stories import Stories
from broker.core.timers import Timers
from broker.core.uploads import Uploads
from broker.core.wake import Wake
from broker.policies.order import ORDERS
from epd import messages as m
from epd.config import BrokerConfig
from epd.errors import ErrorCode
from epd.journal import Happening
from epd.messages import Kind, Message, Stage
from epd.protocol import BY_STRUCT

Frames = Sequence[bytes]
# Which kinds of peers may send each message at all.
_SENDERS = {kind: frozenset(one for one in Kind if row.may_come_from(one)) for kind, row in BY_STRUCT.items()}

Taker = Callable[[Peer, m.Message, Frames, float], None]


class Core:
    """See the module.

    Args:
        config: bounds, times and policies.
        first_generation: where slot generations and legs start; a later broker of the same caches must start higher.
        epoch_s: the wall clock (seconds since 1970) when the clock of `now` was 0; for people who read stories.
    """

    def __init__(self, config: BrokerConfig, first_generation: int = 1, epoch_s: float = 0.0) -> None:
        self.config = config
        self.requests: dict[str, Request] = {}
        self.registry = Registry()
        self._outbox, self._counts, self._wake = Outbox(), Counts(), Wake()
        self._timers, self._delays = Timers(), Timers()
        self._journal = Journal(self._outbox, epoch_s)
        self.ledger = FrameLedger(config.max_frames_bytes)
        choices = (config.encode_choice, config.prefill_choice, config.decode_choice)
        self.stages = Stages(dict(zip(Stage, choices, strict=True)))
        self.patches = Patches(
            config, first_generation, ORDERS[config.patch_order], self.stages[Stage.ENCODE], self._wake.slots_freed
        )
        self._liveness = Liveness(config, self._timers, self.registry, self.stages, lambda: self.patches.has_pools)
        self.legs = Legs(
            self._outbox, self.registry, self.stages, self.patches, self._liveness, self._timers, self._wake,
            first_generation,
        )  # fmt: skip
        self.queue = RequestQueue(
            ORDERS[config.request_order], self.patches.index.holds, self._delays, self._wake
        )  # fmt: skip
        self.stories = Stories(self.requests, config.story_keep, epoch_s)
        self._endings = Endings(
            self.requests, self._outbox, self.legs, self.ledger, self.stories, self._counts, self._timers,
            self.queue.remove,
        )  # fmt: skip
        self._retries = Retries(
            config.max_attempts, self.queue, self.legs, self.patches, self.stages, self._endings, self._counts
        )
        answers = Answers(self._outbox, self._endings, self._retries, self._counts)
        self._progress = Progress(
            self._outbox, self.registry, self.patches, self.legs, self.ledger, self._endings, self._retries, answers,
            self._counts,
        )  # fmt: skip
        self._admission = Admission(
            config, self.requests, self.queue, self._wake, self._outbox, self.stages, self.patches, self._liveness,
            self.legs, self.ledger, self._endings, self._timers, self._counts, self._progress,
            self._journal,
        )  # fmt: skip
        self.uploads = Uploads(
            config.upload_fraction, self._outbox, self.patches, self._liveness, self.legs, self.ledger, self._timers,
            self._counts,
        )  # fmt: skip
        self.status_board = StatusBoard(
            self.registry, self.stages, self._outbox, self.patches, self._counts, self._held
        )
        self._members = Membership(
            config, self._outbox, self.registry, self.stages, self.patches, self._liveness, self.legs,
            self._progress, self._endings, self.uploads, self.status_board, self._timers, self._wake, self._counts,
            self._journal,
        )  # fmt: skip
        self._liveness.on_gone, self._liveness.lose = self._give_up_waiting, self._members.lose
        self._takers = self._who_takes_what()
        self._started = False

    def _who_takes_what(self) -> dict[type, Taker]:
        takers = {
            m.Heartbeat: self._members.heartbeat,
            m.Draining: self._members.draining,
            m.Goodbye: self._members.goodbye,
            m.Serves: self._members.serves,
            m.Submit: self._admission.submit,
            m.Cancel: self._cancel,
            m.Upload: self.uploads.accept,
            m.DropUpload: self.uploads.drop,
            m.GetCache: self._get_cache,
            m.Watch: self._watch,
            m.GetStory: self._get_story,
            m.Encoded: self._encoded,
            m.EncodeFailed: self._not_encoded,
            m.Prefilled: self._progress.prefilled,
            m.Pushed: self._progress.pushed,
            m.StepOutputs: self._progress.stepped,
            m.Stale: self._progress.stale,
            m.NeedPatches: self._progress.need_patches,
            m.LegFailed: self._progress.leg_failed,
            m.Released: self._released,
        }
        return takers  # type: ignore[return-value]

    # ---- in and out ------------------------------------------------------------------------------------------------

    def handle(self, peer_id: str, message: Message, frames: Frames, now: float) -> list[Send]:
        """What to send after `message` from `peer_id` arrived at `now` (seconds of any monotonic clock)."""
        self._start_clock(now)
        peer = self.registry.get(peer_id)
        if peer is not None:
            peer.heard_at = now
        kind = type(message)
        if kind is m.Hello:
            self._members.hello(peer_id, message, now)  # type: ignore[arg-type]
        elif peer is None:
            self._counts.num_fenced += 1
            self._outbox.send(peer_id, m.Unknown())
        elif peer.kind not in _SENDERS[kind]:
            self._counts.num_fenced += 1
        else:
            self._takers[kind](peer, message, frames, now)
        self._delays.run(now)
        self._start(now)
        return self._outbox.take()

    def tick(self, now: float) -> list[Send]:
        """What to send because time has passed: silent and hung peers are lost, late requests fail."""
        self._start_clock(now)
        self._timers.run(now)
        self._delays.run(now)
        self._start(now)
        self._journal.send()
        return self._outbox.take()

    def take(self) -> list[Send]:
        """What is left to send after `handle` has raised."""
        return self._outbox.take()

    def _start(self, now: float) -> None:
        """Starts whatever may start by now."""
        self.uploads.start(now)
        self._admission.start_waiting(now)
        self._dispatch(now)

    def _start_clock(self, now: float) -> None:
        """Takes the first `now` as the birth of this broker: every stage has been absent since then."""
        if not self._started:
            self._started = True
            self._liveness.update(now)

    def _give_up_waiting(self, now: float) -> None:
        self._admission.give_up_waiting(now)
        self.uploads.give_up_waiting(now)

    # ---- what there is ---------------------------------------------------------------------------------------------

    def status(self) -> m.Status:
        """All workers and counters as they are now."""
        return self.status_board.status(list(self.registry.workers.values()), gone=[], is_whole=True)

    def counters(self) -> m.Counters:
        """The counters; the `held_*` ones are 0 when nothing is in flight."""
        return self.status_board.counters()

    def _held(self) -> dict[str, int]:
        return {
            "held_requests": len(self.requests) + len(self.legs.endings),
            "held_queued": len(self.queue),
            "held_pins": self.patches.index.stats().num_pins - self.uploads.num_pins,
            "held_uploads": len(self.uploads.by_id),
            "held_encodes": len(self.patches.queue),
        }

    def _get_cache(self, peer: Peer, message: m.GetCache, frames: Frames, now: float) -> None:
        self._outbox.send(peer.peer_id, m.CacheState(pools=fills(self.patches.index)))

    def _watch(self, peer: Peer, message: m.Watch, frames: Frames, now: float) -> None:
        self._journal.watch(peer, message)

    def _get_story(self, peer: Peer, message: m.GetStory, frames: Frames, now: float) -> None:
        self._outbox.send(peer.peer_id, self.stories.story(message.request_id))

    # ---- requests --------------------------------------------------------------------------------------------------

    def _cancel(self, peer: Peer, message: m.Cancel, frames: Frames, now: float) -> None:
        request = self.requests.get(message.request_id)
        if request is not None and request.endpoint is peer:
            request.tell(now, Happening.CANCELLED, detail=message.reason)
            self._endings.cancel(request, now)

    def _released(self, peer: Peer, message: m.Released, frames: Frames, now: float) -> None:
        if isinstance(peer, Worker):
            self.legs.released(peer, message.leg_id)

    # ---- patches ---------------------------------------------------------------------------------------------------

    def _dispatch(self, now: float) -> None:
        """Gives waiting patches to encode workers, in one message for each worker."""
        given: dict[str, list[Job]] = {}
        for job, worker in self.patches.dispatch():
            jobs = given.get(worker.peer_id)
            if jobs is None:
                jobs = given[worker.peer_id] = []
                self._liveness.gave(worker, now)
            jobs.append(job)
            for holder in self.patches.holders(job.patch_hash):
                holder.keeper.patch_given(holder, job.patch_hash, worker.name, now)
        for peer_id, jobs in given.items():
            message = m.Encode(jobs=[job.message() for job in jobs])
            self._outbox.send(peer_id, message, [frame for job in jobs for frame in job.frames])

    def _encoded(self, peer: Peer, message: m.Encoded, frames: Frames, now: float) -> None:
        """Tells the holders of patches that they can be read."""
        assert isinstance(peer, Worker)
        news: dict[Holder, list[str]] = {}
        jobs = [job for one in message.jobs if (job := self.patches.queue.get(one.job_id))]
        self.patches.observe(jobs, message.took_s)
        for done in self.patches.encoded(peer, message.jobs):
            if done is None:
                self._counts.num_fenced += 1
                continue
            for holder in done.holders:
                news.setdefault(holder, []).append(done.patch_hash)
        for holder, hashes in news.items():
            holder.keeper.patches_there(holder, hashes, peer.name, message.took_s, len(message.jobs), now)

    def _not_encoded(self, peer: Peer, message: m.EncodeFailed, frames: Frames, now: float) -> None:
        assert isinstance(peer, Worker)
        if lost := self.patches.not_encoded(peer, message, now):
            tell_lost(lost, ErrorCode.ENCODE_FAILED, now)

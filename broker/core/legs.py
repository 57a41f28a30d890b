"""Legs: how they begin and end on their workers, and when what they held is free. Pure.

Part of the decision core. An ended leg's slots stay pinned as long as a worker may be reading them: ABORT takes time to
arrive, and a slot that was given away in between would be overwritten under its reader. Workers that still have the leg
are told ABORT; they have let go of it once they say RELEASED, or are lost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from broker.core.encoding import Job
from broker.core.liveness import Liveness
from broker.core.outbox import Outbox
from broker.core.patches import Patches
from broker.core.peers import Registry, Stages, Worker
from broker.core.placement import Placement
from broker.core.request import Leg, Request
from broker.core.timers import Timer, Timers
from broker.core.wake import Room, Wake
from epd import messages as m
from epd.journal import Happening
from epd.messages import PatchReady, Stage

REMIND_EVERY_S = 10.0


@dataclasses.dataclass(slots=True)
class Ending:
    """An ended leg whose slots a worker may still be reading, with those workers by id."""

    leg: Leg
    workers: dict[str, Worker]
    reminder: Timer | None = None


class Legs:
    """All legs that have not ended, by id, and the ended ones that workers have not let go of.

    Args:
        first_leg: where the numbers of legs start; above any that earlier brokers can have used.
    """

    def __init__(
        self,
        outbox: Outbox,
        registry: Registry,
        stages: Stages,
        patches: Patches,
        liveness: Liveness,
        timers: Timers,
        wake: Wake,
        first_leg: int,
    ) -> None:
        self._outbox, self._registry, self._stages, self._patches = outbox, registry, stages, patches
        self._liveness, self._timers, self._wake = liveness, timers, wake
        self._last_id = first_leg - 1
        self.by_id: dict[str, Leg] = {}
        self.endings: dict[str, Ending] = {}

    def new_id(self, request_id: str) -> str:
        """An id for another leg of a request: no worker has seen it, not even from an earlier broker."""
        self._last_id += 1
        return f"{request_id}~{self._last_id:x}"

    def first_id(self, submit: m.Submit) -> str:
        """The id of a request's first leg: the request's own, unless a worker may have seen that one already."""
        seen = submit.attempts > 0 or submit.request_id in self.endings
        return self.new_id(submit.request_id) if seen else submit.request_id

    # ---- beginning -------------------------------------------------------------------------------------------------

    def begin(
        self, request: Request, placed: Placement, missing: Iterable[str], affinity: Sequence[str], now: float
    ) -> None:
        """Tells the workers of a request's leg; a request with only one token to come has no decode worker.

        Args:
            request: a queued one.
            placed: its workers.
            missing: the patches that are not encoded yet.
            affinity: what its work is about (`broker.policies.choice`).
            now: the time.
        """
        prefill, decode, leg, samples = placed.prefill, placed.decode, request.leg, request.submit.prefill_samples
        request.start(prefill, decode, placed.reserved_tokens, missing)
        prefill.tokens_to_prefill += leg.num_tokens
        prefill.legs[leg] = prefill.prefilling[leg] = None
        self._stages[Stage.PREFILL].give(prefill, affinity)
        self._liveness.gave(prefill, now)
        workers = f"prefill on {prefill.name}" + (f", decode on {decode.name}" if decode else "")
        request.tell(now, Happening.STARTED, detail=workers)
        ready = self._patches.readable(one for one in request.patches if one not in leg.missing)
        outputs = list(request.output_token_ids)
        to_prefill = m.Prefill(
            leg_id=leg.leg_id, ready=ready, output_token_ids=outputs, samples=samples, is_last=decode is None
        )
        self._outbox.send(prefill.peer_id, to_prefill, request.engine_frames)
        if decode is None:
            return
        decode.kv_tokens_reserved += leg.reserved_tokens
        decode.legs[leg] = None
        self._stages[Stage.DECODE].give(decode, affinity)
        self._liveness.gave(decode, now)
        assert prefill.info.kv is not None
        to_decode = m.Decode(
            leg_id=leg.leg_id, prefill=prefill.info.kv, output_token_ids=outputs, awaits_token=samples
        )  # fmt: skip
        self._outbox.send(decode.peer_id, to_decode, request.engine_frames)

    # ---- on its way ------------------------------------------------------------------------------------------------

    def send_ready(self, leg: Leg, ready: list[PatchReady]) -> None:
        """Tells the leg's reader that these patches are there; a leg that has not begun has no reader yet."""
        if ready and leg.reader is not None:
            self._outbox.send(leg.reader.peer_id, m.Ready(leg_id=leg.leg_id, ready=ready))

    def leave_prefill(self, leg: Leg) -> None:
        """The prefill worker has nothing left to compute for a leg; it may still have KV to push."""
        prefill = leg.prefill
        if prefill is None or leg not in prefill.prefilling:
            return
        del prefill.prefilling[leg]
        prefill.tokens_to_prefill -= leg.num_tokens
        self._stages.update(prefill)
        self._wake.freed(Room.PREFILL)

    def pushed(self, leg: Leg) -> None:
        """The prefill worker has nothing left to do for a leg."""
        if leg.prefilled and leg.prefill is not None:
            leg.prefill.legs.pop(leg, None)

    def drop_patches(self, leg: Leg) -> None:
        """Nobody reads a leg's patches any more."""
        self.drop_unwanted(self._patches.release(leg))

    def drop_unwanted(self, jobs: list[Job]) -> None:
        """Asks encode workers to drop what nobody waits for."""
        for job in jobs:
            assert job.worker is not None
            self._outbox.send(job.worker.peer_id, m.DropEncode(job_id=job.job_id))

    # ---- ending ----------------------------------------------------------------------------------------------------

    def end(self, leg: Leg, now: float, *, left: Worker | None = None, awaits_kv: bool = False) -> None:
        """Ends a leg: aborts it where it still runs, and unpins its slots once nobody reads them.

        `left` is the worker that has already let go of it. If the decode worker still `awaits_kv`, the prefill worker
        may hold it for a push that nobody wants any more.
        """
        prefill, decode = leg.prefill, leg.decode
        at_prefill = not leg.prefilled or (awaits_kv and not leg.pushed)
        running = [worker for worker in (prefill if at_prefill else None, decode) if worker and worker is not left]
        alive = {worker.peer_id: worker for worker in running if worker.peer_id in self._registry}
        # Before the leg is taken off its workers: otherwise they would look idle for a moment, and their hang checks
        # would start over.
        for worker in alive.values():
            worker.owes[leg.leg_id] = None
            self._liveness.gave(worker, now)
        self.leave_prefill(leg)
        if prefill is not None:
            prefill.legs.pop(leg, None)
        if decode is not None and leg in decode.legs:
            del decode.legs[leg]
            decode.kv_tokens_reserved -= leg.reserved_tokens
            self._stages.update(decode)
            self._wake.freed(Room.DECODE)
        del self.by_id[leg.leg_id]
        if not alive:
            self.drop_patches(leg)
            return
        for peer_id in alive:
            self._outbox.send(peer_id, m.Abort(leg_id=leg.leg_id))
        ending = self.endings[leg.leg_id] = Ending(leg, alive)
        self._remind_later(ending, now)

    def released(self, worker: Worker, leg_id: str) -> bool:
        """A worker no longer reads an ended leg's slots; false if nobody was waiting for that."""
        ending = self.endings.get(leg_id)
        if ending is None or ending.workers.pop(worker.peer_id, None) is None:
            return False
        worker.owes.pop(leg_id, None)
        if not ending.workers:
            self._timers.stop(ending.reminder)
            del self.endings[leg_id]
            self.drop_patches(ending.leg)
        return True

    def _remind_later(self, ending: Ending, now: float) -> None:
        ending.reminder = self._timers.set(now + REMIND_EVERY_S, lambda now: self._remind(ending, now))

    def _remind(self, ending: Ending, now: float) -> None:
        """Repeats ABORT to workers that have not answered for long; one that does not know the leg answers, too."""
        for peer_id in ending.workers:
            self._outbox.send(peer_id, m.Abort(leg_id=ending.leg.leg_id))
        self._remind_later(ending, now)

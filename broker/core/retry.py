"""Tries a request again after its worker was lost: with the same tokens, on other workers, a bounded number of times.

Part of the decision core; pure. Each attempt is a leg with its own id, so that what an earlier one still says or reads
is not mistaken for the current one. A request whose client already has tokens goes on after them, if its endpoint says
that this gives the same as an undisturbed run; otherwise it fails.
"""

from __future__ import annotations

import zlib

from broker.core.counts import Counts
from broker.core.endings import Endings
from broker.core.legs import Legs
from broker.core.patches import Patches
from broker.core.peers import Stages, Worker
from broker.core.queue import RequestQueue
from broker.core.request import Leg, Request, State
from epd.errors import ErrorCode
from epd.journal import Happening

DELAY_S = 0.1


class Retries:
    """Sends started requests back to the queue."""

    def __init__(
        self,
        max_attempts: int,
        queue: RequestQueue,
        legs: Legs,
        patches: Patches,
        stages: Stages,
        endings: Endings,
        counts: Counts,
    ) -> None:
        self._max_attempts, self._queue, self._legs, self._patches = max_attempts, queue, legs, patches
        self._stages, self._endings, self._counts = stages, endings, counts

    def again(
        self,
        request: Request,
        code: ErrorCode,
        text: str,
        now: float,
        *,
        left: Worker | None = None,
        blame: bool = True,
        keep: bool = True,
    ) -> None:
        """Ends a started request's leg and queues it, before all others, for another one; or fails it.

        Args:
            request: it is prefilling or decoding.
            code: what it fails with if it cannot be tried again.
            text: why its leg ends.
            now: the time.
            left: the worker that has already let go of it.
            blame: the request may have killed the worker, so this counts towards `max_attempts`.
            keep: patches that are being encoded for it go on meanwhile.
        """
        if blame:
            request.blame()
        if refusal := self._refusal(request):
            self._endings.fail(request, code, f"{text}; {refusal}", now, left=left)
            return
        leg, awaits_kv = request.leg, request.state is State.PREFILLING
        request.next_leg(self._legs.new_id(request.request_id), now)
        if keep and not leg.prefilled:
            self._patches.index.share(request.leg, leg)
        self._legs.end(leg, now, left=left, awaits_kv=awaits_kv)
        self._legs.by_id[request.leg.leg_id] = request.leg
        self._queue.put_back(request, now + delay_s(request.leg.leg_id, request.num_losses), now)
        self._counts.num_retried += 1
        request.tell(now, Happening.RETRIED, detail=f"{text}; {len(request.output_token_ids)} tokens are kept")

    def patch_lost(self, leg: Leg, text: str, now: float, blame: bool) -> None:
        """The memory of a patch that a leg holds is gone: the patch is acquired again, if it is still needed."""
        request = leg.request
        if leg.prefilled or request.leg is not leg:
            return
        if request.state is State.QUEUED:
            self._legs.drop_patches(leg)
            self._queue.lost_slots(request)
        else:
            self.again(request, ErrorCode.WORKER_LOST, text, now, blame=blame, keep=False)

    def _refusal(self, request: Request) -> str:
        """Why a request cannot be tried again, or an empty string."""
        if request.num_losses >= self._max_attempts:
            return f"tried {request.num_losses} times"
        if request.output_token_ids and not request.submit.resumable:
            return "its answer has begun and cannot be continued exactly"
        if request.num_tokens_left < 1:
            return "it has all the tokens it asked for, but no end"
        return self._stages.too_large(request.num_tokens)


def delay_s(leg_id: str, num_losses: int) -> float:
    """How long a leg waits: longer each time, and different for legs that were lost together.

    The jitter is a hash of the id, not a random number, so that a replay decides alike.
    """
    jitter = zlib.crc32(leg_id.encode()) / (1 << 32)
    return DELAY_S * float(2 ** max(num_losses - 1, 0)) * (0.5 + jitter)

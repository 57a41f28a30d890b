"""How requests end: finished, failed or cancelled, exactly once, releasing all that they held. Pure.

Part of the decision core.
"""

from __future__ import annotations

from collections.abc import Callable

from broker.core.counts import Counts
from broker.core.legs import Legs
from broker.core.outbox import FrameLedger, Outbox
from broker.core.peers import Worker
from broker.core.request import Request, State
from broker.core.stories import Stories
from broker.core.timers import Timers
from epd import messages as m
from epd.errors import ErrorCode
from epd.journal import Happening

RETRY_AFTER_S = 2.0


class Endings:
    """Ends requests.

    Args:
        requests: all that are in flight, by id; those that end are removed.
        leave_queue: called with the id of a request that ends, which may be waiting.
    """

    def __init__(
        self,
        requests: dict[str, Request],
        outbox: Outbox,
        legs: Legs,
        ledger: FrameLedger,
        stories: Stories,
        counts: Counts,
        timers: Timers,
        leave_queue: Callable[[str], None],
    ) -> None:
        self._requests, self._outbox, self._legs, self._ledger = requests, outbox, legs, ledger
        self._stories, self._counts, self._timers, self._leave_queue = stories, counts, timers, leave_queue

    def fail(self, request: Request, code: ErrorCode, text: str, now: float, *, left: Worker | None = None) -> None:
        """Ends a request with an error for its endpoint; `left` is the worker that has already let go of it."""
        request.tell(now, Happening.FAILED, detail=f"{code}: {text}")
        awaits_kv = request.state is State.PREFILLING
        request.fail()
        self._counts.num_failed += 1
        self._end(request, now, left=left, awaits_kv=awaits_kv)
        self._outbox.send(request.endpoint.peer_id, failed(request.request_id, code, text, request.story))

    def cancel(self, request: Request, now: float) -> None:
        """Ends a request that nobody wants any more."""
        awaits_kv = request.state is State.PREFILLING
        request.cancel()
        self._counts.num_cancelled += 1
        self._end(request, now, left=None, awaits_kv=awaits_kv)

    def finish(self, request: Request, token_ids: list[int], now: float, *, left: Worker | None) -> None:
        """Ends a request with its last tokens, from `left`: its decode worker, or None if it was prefill."""
        awaits_kv = request.state is State.PREFILLING and left is not request.leg.decode
        request.finish(token_ids)
        self._counts.num_finished += 1
        self._end(request, now, left=left, awaits_kv=awaits_kv)

    def _end(self, request: Request, now: float, *, left: Worker | None, awaits_kv: bool) -> None:
        for timer in request.timers:
            self._timers.stop(timer)
        self._leave_queue(request.request_id)
        self._ledger.let_go(request.frames_bytes)
        request.let_go()
        del self._requests[request.request_id]
        del request.endpoint.requests[request.request_id]
        self._stories.ended(request)
        self._legs.end(request.leg, now, left=left, awaits_kv=awaits_kv)


def failed(request_id: str, code: ErrorCode, text: str, story: list[m.StoryEvent] | None = None) -> m.Failed:
    """The FAILED message of an error."""
    return m.Failed(
        request_id=request_id, code=code, message=text, status=code.status,
        retry_after_s=RETRY_AFTER_S if code.retry else 0.0,
        story=story or [],
    )  # fmt: skip

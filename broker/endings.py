"""How requests end: finished, failed or cancelled, exactly once, with all that they held let go of. Pure.

Part of the decision core. An ended request's slots are unpinned only when no worker can be reading them any more.
"""

from __future__ import annotations

from broker.board import Board
from broker.encoding import Job
from broker.patches import Lost
from broker.request import Event, Request, State
from epd import messages as m
from epd.errors import HTTP_STATUS, ErrorCode

RETRY_AFTER_S = 2.0
REMIND_EVERY_S = 10.0


class Endings:
    """Ends requests on the board."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._reminded_at = 0.0

    def patch_lost(self, lost: Lost, code: ErrorCode, now: float) -> None:
        """Fails every request that waits for a patch that will not come."""
        for holder in lost.holders:
            if request := self._board.legs.get(holder):
                self.fail(request, code, f"patch {lost.patch_hash[:8]}: {lost.reason}", now)

    def fail(self, request: Request, code: ErrorCode, text: str, now: float, *, left: str = "") -> None:
        """Ends a request with an error for its endpoint; `left` as in `end`."""
        request.tell(now, "failed", detail=f"{code}: {text}")
        self.end(request, Event.FAIL, now, left=left)
        self._board.send(request.endpoint, failed(request.request_id, code, text, request.story))

    def end(self, request: Request, event: Event, now: float, *, left: str = "") -> None:
        """Ends a request and its leg; `left` is the peer that ended it and has already let go of it."""
        is_decoded = event is Event.FINISH and left == request.decode
        awaits_kv = request.state is State.PREFILLING and not is_decoded
        request.move(event)
        self._board.queue.remove(request.request_id)
        self._board.frames_bytes -= request.frames_bytes
        del self._board.requests[request.request_id]
        self._board.count({Event.FINISH: "num_finished", Event.FAIL: "num_failed"}.get(event, "num_cancelled"))
        self._board.remember(request)
        self.end_leg(request, left=left, awaits_kv=awaits_kv)

    def end_leg(self, request: Request, *, left: str = "", awaits_kv: bool = False) -> None:
        """Ends a request's present leg: aborts it where it still runs, and unpins its slots once nobody reads them.

        `left` is the peer that has already let go of it. If the decode worker still `awaits_kv`, the prefill worker may
        hold it for a push that nobody wants any more.
        """
        at_prefill = not request.prefilled or (awaits_kv and not request.pushed)
        running = {request.prefill if at_prefill else "", request.decode} - {"", left}
        self.leave_prefill(request)
        if decode := self._board.registry.get(request.decode):
            decode.requests.discard(request.leg_id)
            decode.load_tokens -= request.reserved_tokens
        del self._board.legs[request.leg_id]
        alive = {peer_id for peer_id in running if self._board.registry.get(peer_id)}
        for peer_id in sorted(alive):
            self._board.send(peer_id, m.Abort(request_id=request.leg_id))
        if alive:
            self._board.releasing[request.leg_id] = alive
        else:
            self.drop_unwanted(self._board.patches.release(request.leg_id))

    def leave_prefill(self, request: Request) -> None:
        """The prefill worker has nothing more to compute for this request."""
        prefill = self._board.registry.get(request.prefill)
        if prefill and request.leg_id in prefill.requests:
            prefill.requests.discard(request.leg_id)
            prefill.load_tokens -= request.prompt_tokens

    def released(self, peer_id: str, leg_id: str) -> None:
        """A peer does not read an ended leg's slots any more."""
        waiting = self._board.releasing.get(leg_id)
        if waiting is None or peer_id not in waiting:
            return
        waiting.discard(peer_id)
        if not waiting:
            del self._board.releasing[leg_id]
            self.drop_unwanted(self._board.patches.release(leg_id))

    def remind(self, now: float) -> None:
        """Says ABORT again to who has not answered it for long; who has nothing of the leg answers all the same."""
        if now - self._reminded_at < REMIND_EVERY_S:
            return
        self._reminded_at = now
        for leg_id, peers in self._board.releasing.items():
            for peer_id in sorted(peers):
                self._board.send(peer_id, m.Abort(request_id=leg_id))

    def drop_unwanted(self, jobs: list[Job]) -> None:
        """Asks encode workers to drop what nobody waits for."""
        for job in jobs:
            self._board.send(job.worker, m.DropEncode(job_id=job.job_id))


def failed(request_id: str, code: ErrorCode, text: str, story: list[m.StoryEvent] | None = None) -> m.Failed:
    """The FAILED message of an error."""
    status = HTTP_STATUS[code]
    retry_after_s = RETRY_AFTER_S if status in (429, 502, 503) else 0.0
    return m.Failed(
        request_id=request_id, code=code, message=text, status=status, retry_after_s=retry_after_s,
        story=story or [],
    )  # fmt: skip

"""Trying a request again after its worker was lost: with the same tokens, on other workers, a bounded number of times.

Part of the decision core; pure. Each attempt is a leg with an id of its own, so that nothing that an earlier one still
says or reads is mistaken for the present one. A request whose client has tokens already goes on after them, where its
endpoint says that this gives what an undisturbed run would have given; else it fails.
"""

from __future__ import annotations

import zlib

from broker import placement
from broker.board import Board
from broker.endings import Endings
from broker.patches import Lost
from broker.request import Request, State
from epd.errors import ErrorCode
from epd.messages import Role

DELAY_S = 0.1


class Retries:
    """Sends requests on the board back to the queue."""

    def __init__(self, board: Board, endings: Endings) -> None:
        self._board, self._endings = board, endings

    def again(
        self,
        request: Request,
        code: ErrorCode,
        text: str,
        now: float,
        *,
        left: str = "",
        blame: bool = True,
        keep: bool = True,
    ) -> None:
        """Ends a started request's leg and queues it, before all others, for another one; or fails it.

        Args:
            request: it is prefilling or decoding.
            code: what it fails with where it cannot be tried again.
            text: why its leg ends.
            now: the time.
            left: the peer that has already let go of it.
            blame: the request may be what has killed the worker, so this counts towards `max_attempts`.
            keep: what is being encoded for it goes on meanwhile.
        """
        request.num_losses += blame
        if refusal := self._refusal(request):
            self._endings.fail(request, code, f"{text}; {refusal}", now, left=left)
            return
        leg_id = self._board.new_leg(request.request_id)
        if keep and not request.prefilled:
            self._board.patches.index.share(leg_id, request.leg_id)
        self._endings.end_leg(request, left=left, awaits_kv=request.state is State.PREFILLING)
        self._board.legs[leg_id] = request
        request.new_leg(leg_id)
        request.queued_at, request.not_before = now, now + delay_s(leg_id, request.num_losses)
        self._board.queue.push_front(request.submit.tenant, request.request_id)
        self._board.count("num_retried")
        request.tell(now, "retried", detail=f"{text}; {len(request.output_token_ids)} tokens are kept")

    def patch_lost(self, lost: Lost, now: float, blame: bool) -> None:
        """The memory of a patch is gone: who still needs it acquires it anew."""
        for holder in lost.holders:
            request = self._board.legs.get(holder)
            if request is None or request.prefilled:
                continue
            if request.state is State.QUEUED:
                self._endings.drop_unwanted(self._board.patches.release(request.leg_id))
            else:
                text = f"patch {lost.patch_hash[:8]}: {lost.reason}"
                self.again(request, ErrorCode.WORKER_LOST, text, now, blame=blame, keep=False)

    def _refusal(self, request: Request) -> str:
        """Why a request cannot be tried again, or an empty string."""
        if request.num_losses >= self._board.config.max_attempts:
            return f"tried {request.num_losses} times"
        if request.output_token_ids and not request.submit.resumable:
            return "its answer has begun and cannot be continued exactly"
        if request.num_tokens_left < 1:
            return "it has all the tokens it asked for, and no end"
        prefills, decodes = self._board.registry.of(Role.PREFILL), self._board.registry.of(Role.DECODE)
        return placement.too_large(request.num_tokens, prefills, decodes)


def delay_s(leg_id: str, num_losses: int) -> float:
    """How long a leg waits: longer each time, and not the same for all that were lost together."""
    jitter = zlib.crc32(leg_id.encode()) / (1 << 32)
    return DELAY_S * float(2 ** max(num_losses - 1, 0)) * (0.5 + jitter)

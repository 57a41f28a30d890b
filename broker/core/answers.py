"""A request's tokens: from the worker that sampled them to the endpoint, in order and exactly once. Pure.

Part of the decision core. If the endpoint has asked for that, the first token of a leg comes from the prefill worker,
with PREFILLED. All others come from the decode worker, in one message for many requests.
"""

from __future__ import annotations

from collections.abc import Sequence

from broker.core.counts import Counts
from broker.core.endings import Endings
from broker.core.outbox import Outbox
from broker.core.peers import Worker
from broker.core.request import Leg, Request, State
from broker.core.retry import Retries
from epd import messages as m
from epd.errors import ErrorCode
from epd.journal import Happening
from epd.messages import LegOutput, RequestOutput


class Answers:
    """Passes tokens on, and ends requests with their last ones."""

    def __init__(self, outbox: Outbox, endings: Endings, retries: Retries, counts: Counts) -> None:
        self._outbox, self._endings, self._retries, self._counts = outbox, endings, retries, counts

    def follows(self, request: Request, output: LegOutput, now: float) -> bool:
        """Whether tokens directly follow those that are there; after a gap the request is tried again from these."""
        num_known = len(request.output_token_ids)
        if output.num_before in (-1, num_known):
            return True
        self._counts.num_fenced += 1
        if output.num_before > num_known:
            text = f"tokens {num_known} to {output.num_before} did not arrive"
            self._retries.again(request, ErrorCode.WORKER_LOST, text, now)
        return False

    def decoded(self, worker: Worker, leg: Leg, output: LegOutput, frames: Sequence[bytes], now: float) -> None:
        """The decode worker has sampled more tokens."""
        request = leg.request
        self._tell(worker.name, request, now, output.num_pushed_tokens)
        request.decoded(output.token_ids)
        self._send(request, output.token_ids, output.num_before, frames)

    def sampled(
        self, worker: Worker, request: Request, message: m.Prefilled, frames: Sequence[bytes], now: float
    ) -> None:
        """The prefill worker has sampled the next token: the client gets it while the KV is still being pushed."""
        ids, num_before = message.token_ids, len(request.output_token_ids)
        if message.finish_reason:
            output = LegOutput(
                leg_id=message.leg_id, token_ids=ids, finish_reason=message.finish_reason, num_before=num_before
            )
            self.finish(request, output, frames, now, worker)
            return
        self._tell(worker.name, request, now)
        request.sampled(ids)
        self._send(request, ids, num_before, frames)

    def prompt_output(self, request: Request, frames: Sequence[bytes]) -> None:
        """The prefill worker has sent log-probabilities of the prompt: the endpoint gets them once."""
        if not request.has_prompt_output:
            request.prompt_output_sent()
            output = RequestOutput(request_id=request.request_id, token_ids=[], num_frames=len(frames))
            self._outbox.output(request.endpoint.peer_id, output, frames)

    def finish(
        self, request: Request, output: LegOutput, frames: Sequence[bytes], now: float, worker: Worker | None = None
    ) -> None:
        """Ends a request with its last tokens, from `worker`: its prefill or (by default) its decode worker."""
        leg = request.leg
        giver = worker or leg.decode
        name = giver.name if giver else ""
        self._tell(name, request, now, output.num_pushed_tokens)
        num_tokens = len(request.output_token_ids) + len(output.token_ids)
        request.tell(now, Happening.FINISHED, worker=name, detail=f"{num_tokens} tokens, {output.finish_reason}")
        by_prefill = giver is not None and giver is leg.prefill
        if giver and not by_prefill:
            giver.num_done += 1
        self._endings.finish(request, output.token_ids, now, left=None if by_prefill else leg.decode)
        reply = RequestOutput(
            request_id=request.request_id,
            token_ids=output.token_ids,
            num_before=output.num_before,
            num_cached_tokens=leg.num_cached_tokens,
            finish_reason=output.finish_reason,
            num_frames=len(frames),
            story=request.story,
        )
        self._outbox.output(request.endpoint.peer_id, reply, frames)

    def _send(self, request: Request, token_ids: list[int], num_before: int, frames: Sequence[bytes]) -> None:
        output = RequestOutput(
            request_id=request.submit.request_id,
            token_ids=token_ids,
            num_before=num_before,
            num_cached_tokens=request.leg.num_cached_tokens,
            num_frames=len(frames),
        )
        self._outbox.output(request.endpoint.peer_id, output, frames)

    @staticmethod
    def _tell(name: str, request: Request, now: float, num_pushed: int = -1) -> None:
        """Adds to the story which worker gives a leg's first token, and which goes on after it."""
        if request.state is not State.DECODING:
            leg = request.leg
            detail = f"KV of {num_pushed} of {leg.num_tokens} tokens was pushed" if num_pushed >= 0 else ""
            what = Happening.DECODING if leg.has_output else Happening.FIRST_TOKEN
            request.tell(now, what, worker=name, detail=detail)

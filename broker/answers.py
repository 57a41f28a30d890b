"""A request's tokens: from the worker that has sampled them to the endpoint, in order and each once. Pure.

Part of the decision core. The first token of a leg comes from the prefill worker, with PREFILLED, where the endpoint
has asked for that; all others come from the decode worker.
"""

from __future__ import annotations

from broker.board import Board
from broker.endings import Endings
from broker.registry import Peer
from broker.request import Event, Request, State
from broker.retry import Retries
from epd import messages as m
from epd.errors import ErrorCode
from epd.messages import Role


class Answers:
    """Passes tokens on, and ends requests with their last ones."""

    def __init__(self, board: Board, endings: Endings, retries: Retries) -> None:
        self._board, self._endings, self._retries = board, endings, retries

    def follows(self, request: Request, message: m.Tokens | m.Finished, now: float) -> bool:
        """Whether tokens come right after those that are there; after a gap the request goes on from what is there."""
        num_known = len(request.output_token_ids)
        if message.num_before in (-1, num_known):
            return True
        self._board.count("num_fenced")
        if message.num_before > num_known:
            text = f"tokens {num_known} to {message.num_before} did not arrive"
            self._retries.again(request, ErrorCode.WORKER_LOST, text, now)
        return False

    def tokens(self, peer: Peer, request: Request, message: m.Tokens, frames: list[bytes], now: float) -> None:
        """The decode worker has sampled more tokens."""
        self._tell(peer.name, request, now, message.num_pushed_tokens)
        request.move(Event.TOKENS)
        self._send(request, message.token_ids, message.num_before, frames)

    def sampled(self, peer: Peer, request: Request, message: m.Prefilled, frames: list[bytes], now: float) -> None:
        """The prefill worker has sampled the next token: the client gets it while the KV is still on its way."""
        ids, num_before = message.token_ids, len(request.output_token_ids)
        if message.finish_reason:
            done = m.Finished(
                request_id=request.leg_id, token_ids=ids, finish_reason=message.finish_reason, num_before=num_before
            )
            self.finish(request, done, frames, now, peer)
            return
        self._tell(peer.name, request, now)
        self._send(request, ids, num_before, frames)

    def _send(self, request: Request, token_ids: list[int], num_before: int, frames: list[bytes]) -> None:
        request.output_token_ids += token_ids
        told = m.Tokens(
            request_id=request.request_id,
            token_ids=token_ids,
            num_before=num_before,
            num_cached_tokens=request.num_cached_tokens,
        )
        self._board.send(request.endpoint, told, frames)

    @staticmethod
    def _tell(name: str, request: Request, now: float, num_pushed: int = -1) -> None:
        """Adds to the story who gives a leg's first token, and who goes on after it."""
        if request.state is not State.DECODING:
            detail = f"KV of {num_pushed} of {request.prompt_tokens} tokens was pushed" if num_pushed >= 0 else ""
            request.tell(now, "decoding" if request.leg_has_output else "first token", worker=name, detail=detail)
        request.leg_has_output = True

    def finish(
        self, request: Request, message: m.Finished, frames: list[bytes], now: float, peer: Peer | None = None
    ) -> None:
        """Ends a request with its last tokens, from `peer`: its prefill or (by default) its decode worker."""
        giver = peer or self._board.registry.get(request.decode)
        name = giver.name if giver else ""
        self._tell(name, request, now, message.num_pushed_tokens)
        request.output_token_ids += message.token_ids
        detail = f"{len(request.output_token_ids)} tokens, {message.finish_reason}"
        request.tell(now, "finished", worker=name, detail=detail)
        if giver and giver.role is Role.DECODE:
            giver.num_done += 1
        by_prefill = giver is not None and giver.peer_id == request.prefill
        self._endings.end(request, Event.FINISH, now, left="" if by_prefill else request.decode)
        reply = m.Finished(
            request_id=request.request_id,
            token_ids=message.token_ids,
            finish_reason=message.finish_reason,
            num_before=message.num_before,
            num_cached_tokens=request.num_cached_tokens,
            story=request.story,
        )
        self._board.send(request.endpoint, reply, frames)

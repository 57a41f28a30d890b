"""A request's way through the stages: admission, start, patches, prefill, decode. Pure.

Part of the decision core: takes in what endpoints and workers say of requests and patches.
"""

from __future__ import annotations

from broker import placement
from broker.board import Board
from broker.encoding import Job
from broker.endings import Endings, failed
from broker.patches import Lost, PixelsNeededError
from broker.registry import Peer
from broker.request import Event, Request, State
from broker.uploads import Uploads
from cache.index import Outcome
from epd import messages as m
from epd.errors import ErrorCode
from epd.messages import Message, Role


class Flow:
    """Moves requests on the board."""

    def __init__(self, board: Board, endings: Endings, uploads: Uploads) -> None:
        self._board, self._endings, self._uploads = board, endings, uploads

    def submit(self, peer: Peer, submit: m.Submit, frames: list[bytes], now: float) -> None:
        """Admits a request to the queue, or refuses it."""
        request = self._unpack(peer, submit, frames, now)
        refusal = self._refusal(request)
        if refusal is not None:
            self._board.count("num_refused")
            self._board.send(peer.peer_id, failed(submit.request_id, *refusal))
            return
        self._board.count("num_accepted")
        self._board.requests[submit.request_id] = request
        self._board.frames_bytes += request.frames_bytes
        self._board.queue.append(submit.request_id)
        request.tell(now, "accepted", detail=f"{submit.num_prompt_tokens} tokens, {len(request.patches)} patches")

    def _unpack(self, peer: Peer, submit: m.Submit, frames: list[bytes], now: float) -> Request:
        at = submit.num_engine_frames
        patch_frames = {}
        for patch in submit.patches:
            patch_frames[patch.patch_hash] = frames[at : at + patch.num_frames]
            at += patch.num_frames
        return Request(
            submit=submit,
            endpoint=peer.peer_id,
            accepted_at=now,
            deadline_at=now + submit.deadline_s,
            engine_frames=frames[: submit.num_engine_frames],
            patch_frames=patch_frames,
            patches={patch.patch_hash: patch for patch in submit.patches},
        )

    def _refusal(self, request: Request) -> tuple[ErrorCode, str] | None:
        submit, config = request.submit, self._board.config
        stages = (Role.ENCODE, Role.PREFILL, Role.DECODE) if submit.patches else (Role.PREFILL, Role.DECODE)
        if submit.request_id in self._board.requests or submit.request_id in self._board.releasing:
            return ErrorCode.DUPLICATE, "a request with this id is in flight"
        if absent := [stage for stage in stages if not self._board.registry.of(stage)]:
            return ErrorCode.NOT_READY, f"no {' and no '.join(absent)} worker is registered"
        if len(self._board.queue) >= config.max_queued or len(self._board.requests) >= config.max_in_flight:
            return ErrorCode.OVERLOADED, f"{len(self._board.requests)} requests are in flight"
        if self._board.frames_bytes + request.frames_bytes > config.max_frames_bytes:
            return ErrorCode.OVERLOADED, f"{self._board.frames_bytes} bytes of pictures are in flight"
        prefills, decodes = self._board.registry.of(Role.PREFILL), self._board.registry.of(Role.DECODE)
        if reason := placement.too_large(submit, prefills, decodes):
            return ErrorCode.TOO_LARGE, reason
        if submit.patches:
            if not self._board.patches.index.pools:
                return ErrorCode.NOT_READY, "no cache is registered"
            try:
                needs = self._board.patches.needs(submit.patches, self._board.registry.of(Role.ENCODE)[0].info)
                fits = self._board.patches.index.could_ever_fit(needs)
            except ValueError as error:  # an unknown modality, or a shape that cannot be
                return ErrorCode.TOO_LARGE, str(error)
            if not fits:
                return ErrorCode.TOO_LARGE, f"the embeddings of {len(needs)} patches do not fit the cache"
        return None

    def start_queued(self, now: float) -> None:
        """Starts the requests that wait, in order, as long as there is room."""
        while self._board.queue:
            request = self._board.requests.get(self._board.queue[0])
            if request is None or request.state is not State.QUEUED or self._start(request, now):
                self._board.queue.popleft()
            else:
                return

    def _start(self, request: Request, now: float) -> bool:
        """Gives a queued request its workers and slots, all or nothing; False while there is no room."""
        prefills, decodes = self._board.registry.of(Role.PREFILL), self._board.registry.of(Role.DECODE)
        placed = placement.place(request.submit, prefills, decodes, self._board.config.decode_reserve_tokens)
        if placed is None:
            return False
        if request.patches:
            encoders = self._board.registry.of(Role.ENCODE)
            if not encoders:
                return False
            try:
                needs = self._board.patches.needs(request.patches.values(), encoders[0].info)
                acquired = self._board.patches.acquire(
                    request.request_id,
                    request.patches,
                    request.patch_frames,
                    needs,
                    prefer_pool=self._pool_near(placed.prefill),
                )
            except PixelsNeededError as error:
                self._endings.fail(request, ErrorCode.PIXELS_NEEDED, str(error), now)
                return True
            except ValueError as error:  # another request has the same hash with another shape
                self._endings.fail(request, ErrorCode.TOO_LARGE, str(error), now)
                return True
            if acquired is None:
                return False
            for item in acquired:
                if item.outcome is not Outcome.NEW:
                    event = "cache hit" if item.outcome is Outcome.HIT else "coalesced"
                    request.tell(now, event, patch=item.patch_hash)
                if item.outcome is not Outcome.HIT:
                    request.missing.add(item.patch_hash)
        prefill, decode = placed.prefill, placed.decode
        request.move(Event.START)
        request.prefill, request.decode = prefill.peer_id, decode.peer_id
        request.reserved_tokens = placed.reserved_tokens
        prefill.load_tokens += request.submit.num_prompt_tokens
        decode.load_tokens += placed.reserved_tokens
        prefill.requests.add(request.request_id)
        decode.requests.add(request.request_id)
        request.tell(now, "started", detail=f"prefill on {prefill.name}, decode on {decode.name}")
        ready = self._board.patches.readable(one for one in request.patches if one not in request.missing)
        frames = request.engine_frames
        self._board.send(prefill.peer_id, m.Prefill(request_id=request.request_id, ready=ready), frames)
        assert prefill.info.kv is not None
        self._board.send(decode.peer_id, m.Decode(request_id=request.request_id, prefill=prefill.info.kv), frames)
        return True

    def _pool_near(self, peer: Peer) -> str | None:
        return next((pool.pool_id for pool in self._board.pools() if pool.host == peer.host), None)

    def dispatch(self, now: float) -> None:
        """Gives waiting patches to encode workers, each worker's in one message."""
        given: dict[str, list[Job]] = {}
        for job, worker in self._board.patches.dispatch(self._board.registry.of(Role.ENCODE), now):
            given.setdefault(worker.peer_id, []).append(job)
            for holder in sorted(self._board.patches.index.holders(job.patch_hash)):
                if request := self._board.requests.get(holder):
                    request.tell(now, "encode", worker=worker.name, patch=job.patch_hash)
        for peer_id, jobs in given.items():
            message = m.Encode(jobs=[job.message() for job in jobs])
            self._board.send(peer_id, message, [frame for job in jobs for frame in job.frames])

    def encoded(self, worker: Peer, message: m.Encoded, now: float) -> None:
        """Tells the readers of patches that they are there."""
        news: dict[str, list[str]] = {}
        jobs = [job for one in message.jobs if (job := self._board.patches.queue.get(one.job_id))]
        self._board.patches.observe(jobs, message.took_s)
        for one in message.jobs:
            done = self._board.patches.encoded(worker, one.job_id, one.generation)
            if done is None:
                self._board.count("num_fenced")
                continue
            for holder in done.holders:
                news.setdefault(holder, []).append(done.patch_hash)
        detail = f"batch of {len(message.jobs)}"
        for holder, hashes in news.items():
            request = self._board.requests.get(holder)
            if self._uploads.encoded(holder, hashes) or request is None:
                continue
            for patch_hash in hashes:
                request.missing.discard(patch_hash)
                request.tell(now, "encoded", worker=worker.name, patch=patch_hash, took_s=message.took_s, detail=detail)
            self._send_ready(request, request.decode if request.prefilled else request.prefill, hashes)

    def patch_lost(self, lost: Lost, code: ErrorCode, now: float) -> None:
        """Fails every request and upload that waits for a patch that will not come."""
        for holder in lost.holders:
            self._uploads.patch_lost(holder, code, lost.reason)
        self._endings.patch_lost(lost, code, now)

    def _send_ready(self, request: Request, reader: str, patch_hashes: list[str]) -> None:
        if ready := self._board.patches.readable(patch_hashes):
            self._board.send(reader, m.Ready(request_id=request.request_id, ready=ready))

    def _prefilled(self, peer: Peer, request: Request, message: m.Prefilled, frames: list[bytes], now: float) -> None:
        request.move(Event.PREFILLED)
        request.prefilled, request.num_cached_tokens = True, message.num_cached_tokens
        detail = f"{message.num_cached_tokens} of {request.submit.num_prompt_tokens} tokens were cached"
        request.tell(now, "prefilled", worker=peer.name, took_s=message.took_s, detail=detail)
        self._board.frames_bytes -= request.frames_bytes
        request.patch_frames, request.engine_frames = {}, []
        self._board.send(request.decode, message)
        self._endings.leave_prefill(request)
        peer.num_done += 1
        self._endings.drop_unwanted(self._board.patches.release(request.request_id))
        if frames:
            self._board.send(request.endpoint, m.Tokens(request_id=request.request_id, token_ids=[]), frames)
        decode = self._board.registry.get(request.decode)
        if request.early_finish and decode:
            self.finish(decode, request, *request.early_finish, now)

    def _need_patches(self, request: Request, patch_hashes: list[str], now: float) -> None:
        """A decode worker has to prefill a preempted request itself: pin what is still in the cache for it."""
        wanted = [request.patches[patch_hash] for patch_hash in patch_hashes if patch_hash in request.patches]
        readable = self._board.patches.readable([patch.patch_hash for patch in wanted])
        encoders = self._board.registry.of(Role.ENCODE)
        request.tell(now, "preempted", detail=f"{len(readable)} of {len(wanted)} patches are in the cache")
        if len(readable) < len(wanted) or not encoders:
            self._endings.fail(request, ErrorCode.PREEMPTED, "preempted, and its patches are not in the cache", now)
            return
        needs = self._board.patches.needs(wanted, encoders[0].info)
        self._board.patches.acquire(request.request_id, request.patches, {}, needs)
        self._board.send(request.decode, m.Ready(request_id=request.request_id, ready=readable))

    def from_leg(self, peer: Peer, message: Message, frames: list[bytes], now: float) -> None:
        """Takes in what a prefill or decode worker says of a request."""
        request = self._board.requests.get(message.request_id)  # type: ignore[union-attr]
        if request is None or peer.peer_id not in (request.prefill, request.decode):
            if isinstance(message, m.Prefilled | m.Failed | m.Finished):  # what has ended here has ended there too
                self._endings.released(peer.peer_id, message.request_id)
            else:
                self._board.count("num_fenced")
            return
        match message:
            case m.Prefilled() if not request.prefilled and request.allows(Event.PREFILLED):
                self._prefilled(peer, request, message, frames, now)
            case m.Pushed() if not request.pushed and request.allows(Event.PUSHED):
                request.pushed = True
                request.tell(now, "pushed", worker=peer.name)
            case m.Stale():
                self._board.count("num_stale")
                request.tell(now, "stale", worker=peer.name, patch=message.patch_hash, detail=message.reason)
                if lost := self._board.patches.stale(request, message.patch_hash, message.generation):
                    self.patch_lost(lost, ErrorCode.ENCODE_FAILED, now)
                else:
                    self._send_ready(request, peer.peer_id, [message.patch_hash])
            case m.NeedPatches():
                self._need_patches(request, message.patch_hashes, now)
            case m.Tokens() if request.allows(Event.TOKENS):
                if request.num_tokens_out == 0:
                    request.tell(now, "first token", worker=peer.name)
                request.move(Event.TOKENS)
                request.num_tokens_out += len(message.token_ids)
                reply = m.Tokens(message.request_id, message.token_ids, request.num_cached_tokens)
                self._board.send(request.endpoint, reply, frames)
            case m.Finished() if request.allows(Event.FINISH):
                if request.prefilled:
                    self.finish(peer, request, message, frames, now)
                else:  # wait for PREFILLED, which may carry prompt log-probabilities
                    request.early_finish = message, frames
            case m.Failed():
                code = ErrorCode(message.code) if message.code in set(ErrorCode) else ErrorCode.ENGINE_FAILED
                self._endings.fail(request, code, f"{peer.name}: {message.message}", now, left=peer.peer_id)
            case _:
                self._board.count("num_fenced")

    def finish(self, peer: Peer, request: Request, message: m.Finished, frames: list[bytes], now: float) -> None:
        """Ends a request that the decode worker `peer` has finished."""
        if request.num_tokens_out == 0:
            request.tell(now, "first token", worker=peer.name)
        request.num_tokens_out += len(message.token_ids)
        detail = f"{request.num_tokens_out} tokens, {message.finish_reason}"
        request.tell(now, "finished", worker=peer.name, detail=detail)
        peer.num_done += 1
        self._endings.end(request, Event.FINISH, now, left=peer.peer_id)
        reply = m.Finished(
            request_id=message.request_id,
            token_ids=message.token_ids,
            finish_reason=message.finish_reason,
            num_cached_tokens=request.num_cached_tokens,
            story=request.story,
        )
        self._board.send(request.endpoint, reply, frames)

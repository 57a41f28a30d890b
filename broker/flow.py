"""A request's way through the stages: admission, start, patches, prefill, decode. Pure.

Part of the decision core: takes in what endpoints and workers say of requests and patches.
"""

from __future__ import annotations

from broker import placement
from broker.answers import Answers
from broker.board import Board
from broker.encoding import Job
from broker.endings import Endings, failed
from broker.liveness import Liveness, named, needed
from broker.patches import Lost, PixelsNeededError
from broker.registry import Peer
from broker.request import Event, Request
from broker.retry import Retries
from broker.uploads import Uploads
from cache.index import Outcome, PatchNeed
from epd import messages as m
from epd.errors import ErrorCode
from epd.messages import Message, Role


class Flow:
    """Moves requests on the board."""

    def __init__(
        self,
        board: Board,
        endings: Endings,
        uploads: Uploads,
        retries: Retries,
        liveness: Liveness,
        answers: Answers,
    ) -> None:
        self._board, self._endings, self._uploads = board, endings, uploads
        self._retries, self._liveness, self._answers = retries, liveness, answers

    def submit(self, peer: Peer, submit: m.Submit, frames: list[bytes], now: float) -> None:
        """Admits a request to the queue, or refuses it; what has come already changes nothing."""
        known = self._board.requests.get(submit.request_id)
        if known is not None and known.endpoint == peer.peer_id:
            self._board.count("num_fenced")
            return
        request = self._unpack(peer, submit, frames, now)
        refusal = self._refusal(request, now)
        if refusal is not None:
            self._board.count("num_refused")
            self._board.send(peer.peer_id, failed(submit.request_id, *refusal))
            return
        if self._is_queue_full(submit) and (other := self._gives_way(submit.tenant)):
            text = "too many requests of this tenant wait, and another tenant's has come"
            self._endings.fail(other, ErrorCode.OVERLOADED, text, now)
        self._board.count("num_accepted")
        self._board.requests[submit.request_id] = self._board.legs[request.leg_id] = request
        self._board.frames_bytes += request.frames_bytes
        self._board.queue.push(submit.tenant, submit.request_id, request.cost)
        detail = f"{submit.num_prompt_tokens} tokens, {len(request.patches)} patches"
        if submit.attempts:
            detail += f", tried {submit.attempts} times before, {len(submit.output_token_ids)} tokens are kept"
        request.tell(now, "accepted", detail=detail)

    def _unpack(self, peer: Peer, submit: m.Submit, frames: list[bytes], now: float) -> Request:
        at = submit.num_engine_frames
        patch_frames = {}
        request_id = submit.request_id
        seen = submit.attempts > 0 or request_id in self._board.releasing
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
            leg_id=self._board.new_leg(request_id) if seen else request_id,
            output_token_ids=list(submit.output_token_ids),
            num_losses=submit.attempts,
            queued_at=now,
        )

    def _refusal(self, request: Request, now: float) -> tuple[ErrorCode, str] | None:
        submit, config = request.submit, self._board.config
        if submit.request_id in self._board.requests:
            return ErrorCode.DUPLICATE, "a request with this id is in flight"
        if gone := self._liveness.gone(needed(bool(submit.patches)), now):
            return ErrorCode.NOT_READY, f"{named(gone, 'no')} is registered"
        is_full = self._is_queue_full(submit) and self._gives_way(submit.tenant) is None
        if is_full or len(self._board.requests) >= config.max_in_flight:
            return ErrorCode.OVERLOADED, f"{len(self._board.requests)} requests are in flight"
        if self._board.frames_bytes + request.frames_bytes > config.max_frames_bytes:
            return ErrorCode.OVERLOADED, f"{self._board.frames_bytes} bytes of media are in flight"
        prefills, decodes = self._board.registry.of(Role.PREFILL), self._board.registry.of(Role.DECODE)
        if reason := placement.too_large(request.num_tokens, prefills, decodes):
            return ErrorCode.TOO_LARGE, reason
        if request.num_tokens_left < 1:
            return ErrorCode.TOO_LARGE, "it has all the tokens it asks for already"
        if submit.patches and self._board.encode_info and self._board.patches.index.pools:
            try:
                needs = self._board.patches.needs(submit.patches, self._board.encode_info)
                fits = self._board.patches.index.could_ever_fit(needs)
            except ValueError as error:  # an unknown modality, or a shape that cannot be
                return ErrorCode.TOO_LARGE, str(error)
            if not fits:
                return ErrorCode.TOO_LARGE, f"the embeddings of {len(needs)} patches do not fit the cache"
        return None

    def _is_queue_full(self, submit: m.Submit) -> bool:
        """Whether a request finds no place in the queue; one that an earlier broker had admitted always does."""
        return not submit.attempts and len(self._board.queue) >= self._board.config.max_queued

    def _gives_way(self, tenant: str) -> Request | None:
        """The queued request that a new one of `tenant` would displace: the newest of whoever has the most of them.

        None where that tenant has no more than `tenant` would have then.
        """
        longest = self._board.queue.newest_of_longest()
        if longest is None or self._board.queue.count(longest[0]) <= self._board.queue.count(tenant) + 1:
            return None
        return self._board.requests[longest[1]]

    def start_queued(self, now: float) -> None:
        """Starts the requests that wait, in turn, as long as there is room; who waits for a stage is passed by."""

        def may_start(request_id: str) -> bool:
            request = self._board.requests[request_id]
            return now >= request.not_before and not self._liveness.absent(needed(bool(request.patches)))

        def holds_slots(request_id: str) -> bool:
            """What has kept its slots goes first: whoever waits for slots might be waiting for these."""
            return self._board.patches.index.holds(self._board.requests[request_id].leg_id)

        while (request_id := self._board.queue.next(may_start, holds_slots)) is not None:
            if not self._start(self._board.requests[request_id], now):
                return
            if request_id in self._board.queue:  # else it has failed
                self._board.queue.take(request_id)

    def _start(self, request: Request, now: float) -> bool:
        """Gives a queued request its workers and slots, all or nothing; False while there is no room."""
        prefills, decodes = self._board.registry.serving(Role.PREFILL), self._board.registry.serving(Role.DECODE)
        if request.patches:
            prefills = self._board.patches.reachable_by(prefills, request.patches)
        num_outputs = min(request.num_tokens_left, self._board.config.decode_reserve_tokens)
        samples = request.submit.prefill_samples
        is_last = samples and request.num_tokens_left == 1
        placed = placement.place(request.num_tokens, num_outputs, prefills, None if is_last else decodes)
        if placed is None:
            return False
        if request.patches:
            assert self._board.encode_info is not None
            needs: list[PatchNeed] = []
            try:
                needs = self._board.patches.needs(request.patches.values(), self._board.encode_info)
                acquired = self._board.patches.acquire(
                    request.leg_id,
                    request.patches,
                    request.patch_frames,
                    needs,
                    prefer_pool=self._pool_near(placed.prefill),
                    tenant=request.submit.tenant,
                )
            except PixelsNeededError as error:
                self._endings.fail(request, ErrorCode.PIXELS_NEEDED, str(error), now)
                return True
            except ValueError as error:  # another request has the same hash with another shape
                self._endings.fail(request, ErrorCode.TOO_LARGE, str(error), now)
                return True
            if acquired is None:
                if self._board.patches.index.could_ever_fit(needs):
                    return False
                text = f"the embeddings of {len(needs)} patches do not fit the cache"
                self._endings.fail(request, ErrorCode.TOO_LARGE, text, now)
                return True
            for item in acquired:
                if item.outcome is not Outcome.NEW:
                    event = "cache hit" if item.outcome is Outcome.HIT else "coalesced"
                    request.tell(now, event, patch=item.patch_hash)
                if item.outcome is not Outcome.HIT:
                    request.missing.add(item.patch_hash)
        self._begin_leg(request, placed, samples, now)
        return True

    def _begin_leg(self, request: Request, placed: placement.Placement, samples: bool, now: float) -> None:
        """Tells the workers of a request's leg; one that can only have one more token needs no decode worker."""
        prefill, decode = placed.prefill, placed.decode
        request.move(Event.START)
        leg_id, frames, outputs = request.leg_id, request.engine_frames, list(request.output_token_ids)
        request.prefill, request.prompt_tokens = prefill.peer_id, request.num_tokens
        prefill.load_tokens += request.prompt_tokens
        prefill.requests.add(leg_id)
        workers = f"prefill on {prefill.name}" + (f", decode on {decode.name}" if decode else "")
        request.tell(now, "started", detail=workers)
        ready = self._board.patches.readable(one for one in request.patches if one not in request.missing)
        to_prefill = m.Prefill(
            request_id=leg_id, ready=ready, output_token_ids=outputs, samples=samples, is_last=decode is None
        )
        self._board.send(prefill.peer_id, to_prefill, frames)
        if decode is None:
            return
        request.decode, request.reserved_tokens = decode.peer_id, placed.reserved_tokens
        decode.load_tokens += placed.reserved_tokens
        decode.requests.add(leg_id)
        assert prefill.info.kv is not None
        kv = prefill.info.kv
        to_decode = m.Decode(request_id=leg_id, prefill=kv, output_token_ids=outputs, awaits_token=samples)
        self._board.send(decode.peer_id, to_decode, frames)

    def _pool_near(self, peer: Peer) -> str | None:
        return next((pool.pool_id for pool in self._board.pools() if pool.host == peer.host), None)

    def dispatch(self, now: float) -> None:
        """Gives waiting patches to encode workers, each worker's in one message."""
        given: dict[str, list[Job]] = {}
        for job, worker in self._board.patches.dispatch(self._board.registry.serving(Role.ENCODE), now):
            given.setdefault(worker.peer_id, []).append(job)
            for holder in sorted(self._board.patches.index.holders(job.patch_hash)):
                if request := self._board.legs.get(holder):
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
            request = self._board.legs.get(holder)
            if self._uploads.encoded(holder, hashes) or request is None:
                continue
            for patch_hash in hashes:
                request.missing.discard(patch_hash)
                request.tell(now, "encoded", worker=worker.name, patch=patch_hash, took_s=message.took_s, detail=detail)
            self._send_ready(request, request.decode if request.prefilled else request.prefill, hashes)

    def patch_lost(self, lost: Lost, code: ErrorCode, now: float, *, blame: bool = True) -> None:
        """Who waits for a patch that will not come fails, or is tried again; `blame` as in `Retries.again`."""
        for holder in lost.holders:
            self._uploads.patch_lost(holder, code, lost.reason)
        if lost.again:
            self._retries.patch_lost(lost, now, blame)
        else:
            self._endings.patch_lost(lost, code, now)

    def _send_ready(self, request: Request, reader: str, patch_hashes: list[str]) -> None:
        ready = self._board.patches.readable(patch_hashes)
        if ready and reader:  # a request that waits for its next leg has no reader
            self._board.send(reader, m.Ready(request_id=request.leg_id, ready=ready))

    def _prefilled(self, peer: Peer, request: Request, message: m.Prefilled, frames: list[bytes], now: float) -> None:
        request.move(Event.PREFILLED)
        request.num_cached_tokens = message.num_cached_tokens
        detail = f"{message.num_cached_tokens} of {request.prompt_tokens} tokens were cached"
        request.tell(now, "prefilled", worker=peer.name, took_s=message.took_s, detail=detail)
        peer.num_done += 1
        self.leave_patches(request)
        if message.token_ids or message.finish_reason:
            self._answers.sampled(peer, request, message, frames, now)
        if self._board.registry.get(request.decode) and not message.finish_reason:
            self._board.send(request.decode, message)
        if frames and not message.token_ids and not request.has_prompt_output:
            request.has_prompt_output = True
            self._board.send(request.endpoint, m.Tokens(request_id=request.request_id, token_ids=[]), frames)
        if request.early_finish:
            self._answers.finish(request, *request.early_finish, now)

    def leave_patches(self, request: Request) -> None:
        """The prompt is computed, and nobody reads the patches any more; the engine request is kept for another leg."""
        request.prefilled = True
        before = request.frames_bytes
        request.patch_frames = {}
        self._board.frames_bytes -= before - request.frames_bytes
        self._endings.leave_prefill(request)
        self._endings.drop_unwanted(self._board.patches.release(request.leg_id))

    def _need_patches(self, request: Request, patch_hashes: list[str], now: float) -> None:
        """A decode worker has to prefill a preempted request itself: pin what is still in the cache for it."""
        wanted = [request.patches[patch_hash] for patch_hash in patch_hashes if patch_hash in request.patches]
        readable = self._board.patches.readable([patch.patch_hash for patch in wanted])
        request.tell(now, "preempted", detail=f"{len(readable)} of {len(wanted)} patches are in the cache")
        if len(readable) < len(wanted) or self._board.encode_info is None:
            text = "preempted, and its patches are not in the cache"
            self._retries.again(request, ErrorCode.PREEMPTED, text, now)
            return
        needs = self._board.patches.needs(wanted, self._board.encode_info)
        self._board.patches.acquire(request.leg_id, request.patches, {}, needs)
        self._board.send(request.decode, m.Ready(request_id=request.leg_id, ready=readable))

    def from_leg(self, peer: Peer, message: Message, frames: list[bytes], now: float) -> None:
        """Takes in what a prefill or decode worker says of a request."""
        request = self._board.legs.get(message.request_id)  # type: ignore[union-attr]
        if request is None or peer.peer_id not in (request.prefill, request.decode):
            if isinstance(message, m.Prefilled | m.Failed | m.Finished):  # what has ended here has ended there too
                self._endings.released(peer.peer_id, message.request_id)
            else:
                self._board.count("num_fenced")
            return
        if isinstance(message, m.Tokens | m.Finished) and not self._answers.follows(request, message, now):
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
                times, since = request.stale.get(message.patch_hash, (0, now))
                times += 1
                request.stale[message.patch_hash] = times, since
                if self._board.patches.hopeless(times, since, now):
                    text = f"patch {message.patch_hash[:8]} was not found in its slot {times} times: {message.reason}"
                    self._endings.fail(request, ErrorCode.ENCODE_FAILED, text, now)
                elif lost := self._board.patches.stale(request, message.patch_hash, message.generation):
                    self.patch_lost(lost, ErrorCode.ENCODE_FAILED, now)
                else:
                    self._send_ready(request, peer.peer_id, [message.patch_hash])
            case m.NeedPatches() if peer.peer_id == request.decode:
                self._need_patches(request, message.patch_hashes, now)
            case m.Tokens() if request.allows(Event.TOKENS):
                self._answers.tokens(peer, request, message, frames, now)
            case m.Finished() if request.allows(Event.FINISH):
                if request.prefilled:
                    self._answers.finish(request, message, frames, now, peer)
                else:  # wait for PREFILLED, which may carry prompt log-probabilities
                    request.early_finish = message, frames
            case m.Failed():
                code = ErrorCode(message.code) if message.code in set(ErrorCode) else ErrorCode.ENGINE_FAILED
                text = f"{peer.name}: {message.message}"
                if code in (ErrorCode.PREEMPTED, ErrorCode.WORKER_LOST):
                    self._retries.again(request, code, text, now, left=peer.peer_id)
                else:
                    self._endings.fail(request, code, text, now, left=peer.peer_id)
            case _:
                self._board.count("num_fenced")

"""The decision core: messages in, messages out. Pure: no sockets, no clocks, no asyncio.

`Core.handle` takes one message from one peer, and `Core.tick` the time; both return what to send. The daemon performs
it, tests and the simulator call it directly. It owns the registry, the requests in flight and the patches; every
accepted request ends in exactly one FINISHED or FAILED, or in silence when its endpoint cancelled it or is gone.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import NamedTuple

from broker import placement
from broker.encoding import Job
from broker.patches import Done, Lost, Patches
from broker.registry import Peer, Registry
from broker.request import Event, Request, State
from cache.index import Outcome
from epd import messages as m
from epd.config import BrokerConfig
from epd.errors import HTTP_STATUS, ErrorCode
from epd.messages import Message, Role

RETRY_AFTER_S = 2.0


class Send(NamedTuple):
    """Something to do: send this message with these opaque frames to that peer."""

    peer_id: str
    message: Message
    frames: list[bytes]


class Core:
    """See the module.

    Args:
        config: bounds and times.
        first_generation: where slot generations start; a later broker of the same caches must start higher.
    """

    def __init__(self, config: BrokerConfig, first_generation: int = 1) -> None:
        self.config = config
        self.registry = Registry()
        self.patches = Patches(config.encode_batches_ahead, first_generation)
        self.requests: dict[str, Request] = {}
        self._queue: deque[str] = deque()
        self._releasing: dict[str, set[str]] = {}
        self._stories: OrderedDict[str, m.Story] = OrderedDict()
        self._out: list[Send] = []
        self._frames_bytes = 0
        self._counts = dict.fromkeys(m.Counters.__struct_fields__, 0)

    # ---- entry points ----------------------------------------------------------------------------------------------

    def handle(self, peer_id: str, message: Message, frames: list[bytes], now: float) -> list[Send]:
        """What to send after `message` from `peer_id` arrived at `now` (seconds of any monotonic clock)."""
        peer = self.registry.get(peer_id)
        if peer is not None:
            peer.heard_at = now
        if isinstance(message, m.Hello):
            self._hello(peer_id, message, now)
        elif peer is None:
            self._count("num_fenced")
            self._send(peer_id, m.Unknown())
        elif peer.role not in m.BY_STRUCT[type(message)].to_broker:
            self._count("num_fenced")
        else:
            self._from_peer(peer, message, frames, now)
        self._start_queued(now)
        self._dispatch(now)
        return self._take()

    def tick(self, now: float) -> list[Send]:
        """What to send because time has passed: silent peers are lost, late requests fail."""
        for peer in self.registry.silent_since(now - self.config.lost_after_s):
            self._lose(peer, f"silent for {now - peer.heard_at:.1f} s", now)
        for request in list(self.requests.values()):
            if now >= request.deadline_at:
                self._fail(request, ErrorCode.DEADLINE, "the request's deadline has passed", now)
            elif request.state is State.QUEUED and now - request.accepted_at > self.config.max_queue_s:
                self._fail(request, ErrorCode.OVERLOADED, "no worker became free in time", now)
        self.patches.lift_quarantine("", now)
        self._start_queued(now)
        self._dispatch(now)
        return self._take()

    def status(self) -> m.Status:
        """Workers, pools and counters as they are now."""
        peers = [peer for peer in self.registry if peer.role in m.STAGES]
        pools = sum(len(peer.pools) for peer in self.registry)
        return m.Status(workers=[peer.status() for peer in peers], counters=self.counters(), num_pools=pools)

    def counters(self) -> m.Counters:
        """The counts; the `held_*` ones are 0 when nothing is in flight."""
        stats = self.patches.index.stats()
        self._counts.update(
            num_encoded=self.patches.num_encoded,
            num_cache_hits=stats.num_hits,
            num_coalesced=stats.num_coalesced,
            num_evicted=stats.num_evictions,
            held_requests=len(self.requests) + len(self._releasing),
            held_queued=len(self._queue),
            held_pins=stats.num_pins,
            held_encodes=len(self.patches.queue),
            cache_bytes_used=stats.used_bytes,
            cache_bytes_total=stats.total_bytes,
        )
        return m.Counters(**self._counts)

    # ---- peers -----------------------------------------------------------------------------------------------------

    def _hello(self, peer_id: str, hello: m.Hello, now: float) -> None:
        if hello.incarnation != peer_id:
            self._count("num_fenced")
            return
        if self.registry.get(peer_id) is None:
            if earlier := self.registry.named(hello.name):
                self._lose(earlier, "it registered again", now)
            self.patches.lift_quarantine(hello.name, now)
            self.registry.add(peer_id, hello, now)
            for pool in hello.pools:
                self.patches.index.add_pool(pool)
            if hello.pools:
                self._tell_pools()
            self._tell_status()
        pools = [pool for peer in self.registry for pool in peer.pools]
        self._send(
            peer_id,
            m.Welcome(heartbeat_s=self.config.heartbeat_s, lost_after_s=self.config.lost_after_s, pools=pools),
        )
        if hello.role is Role.ENDPOINT:
            self._send(peer_id, self.status())

    def _lose(self, peer: Peer, reason: str, now: float) -> None:
        self.registry.remove(peer.peer_id)
        lost: list[Lost] = []
        for pool in peer.pools:
            lost += self.patches.pool_lost(pool)
        if peer.role is Role.ENCODE:
            lost += self.patches.worker_lost(peer, now)
        for one in lost:
            self._patch_lost(one, ErrorCode.WORKER_LOST, now)
        for waiting in list(self._releasing):
            self._released(peer.peer_id, waiting)
        for request in list(self.requests.values()):
            if request.endpoint == peer.peer_id:
                self._end(request, Event.CANCEL, now)
            elif request.decode == peer.peer_id or (request.prefill == peer.peer_id and not request.pushed):
                text = f"{peer.role} worker {peer.name} was lost ({reason})"
                self._fail(request, ErrorCode.WORKER_LOST, text, now)
        if peer.role is Role.ENCODE and not self.registry.of(Role.ENCODE):
            for request in list(self.requests.values()):
                if request.missing:
                    self._fail(request, ErrorCode.WORKER_LOST, "the last encode worker was lost", now)
        if peer.pools:
            self._tell_pools()
        self._tell_status()

    def _tell_pools(self) -> None:
        pools = [pool for peer in self.registry for pool in peer.pools]
        for peer in self.registry:
            if peer.role in m.STAGES:
                self._send(peer.peer_id, m.Pools(pools=pools))

    def _tell_status(self) -> None:
        for peer in self.registry.of(Role.ENDPOINT):
            self._send(peer.peer_id, self.status())

    # ---- messages of registered peers ------------------------------------------------------------------------------

    def _from_peer(self, peer: Peer, message: Message, frames: list[bytes], now: float) -> None:
        match message:
            case m.Heartbeat():
                peer.num_steps = message.num_steps
                self._send(peer.peer_id, m.HeartbeatAck())
                if peer.role is Role.ENDPOINT:
                    self._send(peer.peer_id, self.status())
            case m.Goodbye():
                self._lose(peer, message.reason or "it said goodbye", now)
            case m.Submit():
                self._submit(peer, message, frames, now)
            case m.Cancel():
                if (request := self.requests.get(message.request_id)) and request.endpoint == peer.peer_id:
                    request.tell(now, "cancelled", detail=message.reason)
                    self._end(request, Event.CANCEL, now)
            case m.GetStory():
                self._send(peer.peer_id, self._story(message.request_id))
            case m.Encoded():
                if done := self.patches.encoded(peer, message.job_id, message.generation):
                    self._encoded(peer, done, message, now)
                else:
                    self._count("num_fenced")
            case m.EncodeFailed():
                if lost := self.patches.not_encoded(peer, message.job_id, message.message):
                    self._patch_lost(lost, ErrorCode.ENCODE_FAILED, now)
            case m.Released():
                self._released(peer.peer_id, message.request_id)
            case m.Prefilled() | m.Pushed() | m.Stale() | m.Tokens() | m.Finished() | m.Failed() | m.NeedPatches():
                self._from_leg(peer, message, frames, now)

    def _from_leg(self, peer: Peer, message: Message, frames: list[bytes], now: float) -> None:
        request = self.requests.get(message.request_id)  # type: ignore[union-attr]
        if request is None or peer.peer_id not in (request.prefill, request.decode):
            if isinstance(message, m.Prefilled | m.Failed | m.Finished):
                self._released(peer.peer_id, message.request_id)  # what had ended here already has ended there too
            else:
                self._count("num_fenced")
            return
        match message:
            case m.Prefilled() if not request.prefilled and request.allows(Event.PREFILLED):
                self._prefilled(peer, request, message, frames, now)
            case m.Pushed() if not request.pushed and request.allows(Event.PUSHED):
                request.pushed = True
                request.tell(now, "pushed", worker=peer.name)
            case m.Stale():
                self._count("num_stale")
                request.tell(now, "stale", worker=peer.name, patch=message.patch_hash, detail=message.reason)
                if lost := self.patches.stale(request, message.patch_hash, message.generation):
                    self._patch_lost(lost, ErrorCode.ENCODE_FAILED, now)
                else:
                    self._send_ready(request, peer.peer_id, [message.patch_hash])
            case m.NeedPatches():
                self._need_patches(request, message.patch_hashes, now)
            case m.Tokens() if request.allows(Event.TOKENS):
                if request.num_tokens_out == 0:
                    request.tell(now, "first token", worker=peer.name)
                request.move(Event.TOKENS)
                request.num_tokens_out += message.num_new_tokens
                self._send(request.endpoint, message, frames)
            case m.Finished() if request.allows(Event.FINISH):
                if request.num_tokens_out == 0:
                    request.tell(now, "first token", worker=peer.name)
                request.num_tokens_out += message.num_new_tokens
                detail = f"{request.num_tokens_out} tokens, {message.finish_reason}"
                request.tell(now, "finished", worker=peer.name, detail=detail)
                peer.num_done += 1
                self._end(request, Event.FINISH, now, left=peer.peer_id)
                reply = m.Finished(
                    request_id=message.request_id,
                    num_new_tokens=message.num_new_tokens,
                    finish_reason=message.finish_reason,
                    story=request.story,
                )
                self._send(request.endpoint, reply, frames)
            case m.Failed():
                code = ErrorCode(message.code) if message.code in set(ErrorCode) else ErrorCode.ENGINE_FAILED
                self._fail(request, code, f"{peer.name}: {message.message}", now, left=peer.peer_id)
            case _:
                self._count("num_fenced")

    # ---- a request's way -------------------------------------------------------------------------------------------

    def _submit(self, peer: Peer, submit: m.Submit, frames: list[bytes], now: float) -> None:
        request = self._unpack(peer, submit, frames, now)
        refusal = self._refusal(request)
        if refusal is not None:
            self._count("num_refused")
            self._send(peer.peer_id, _failed(submit.request_id, *refusal))
            return
        self._count("num_accepted")
        self.requests[submit.request_id] = request
        self._frames_bytes += request.frames_bytes
        self._queue.append(submit.request_id)
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
        submit, config = request.submit, self.config
        stages = (Role.ENCODE, Role.PREFILL, Role.DECODE) if submit.patches else (Role.PREFILL, Role.DECODE)
        if submit.request_id in self.requests or submit.request_id in self._releasing:
            return ErrorCode.DUPLICATE, "a request with this id is in flight"
        if absent := [stage for stage in stages if not self.registry.of(stage)]:
            return ErrorCode.NOT_READY, f"no {' and no '.join(absent)} worker is registered"
        if len(self._queue) >= config.max_queued or len(self.requests) >= config.max_in_flight:
            return ErrorCode.OVERLOADED, f"{len(self.requests)} requests are in flight"
        if self._frames_bytes + request.frames_bytes > config.max_frames_bytes:
            return ErrorCode.OVERLOADED, f"{self._frames_bytes} bytes of pictures are in flight"
        prefills, decodes = self.registry.of(Role.PREFILL), self.registry.of(Role.DECODE)
        if reason := placement.too_large(submit, prefills, decodes):
            return ErrorCode.TOO_LARGE, reason
        if submit.patches:
            if not self.patches.index.pools:
                return ErrorCode.NOT_READY, "no cache is registered"
            try:
                needs = self.patches.needs(submit.patches, self.registry.of(Role.ENCODE)[0].info)
                fits = self.patches.index.could_ever_fit(needs)
            except ValueError as error:  # an unknown modality, or a shape that cannot be
                return ErrorCode.TOO_LARGE, str(error)
            if not fits:
                return ErrorCode.TOO_LARGE, f"the embeddings of {len(needs)} patches do not fit the cache"
        return None

    def _start_queued(self, now: float) -> None:
        while self._queue:
            request = self.requests.get(self._queue[0])
            if request is None or request.state is not State.QUEUED or self._start(request, now):
                self._queue.popleft()
            else:
                return

    def _start(self, request: Request, now: float) -> bool:
        """Gives a queued request its workers and slots, all or nothing; False while there is no room."""
        prefills, decodes = self.registry.of(Role.PREFILL), self.registry.of(Role.DECODE)
        placed = placement.place(request.submit, prefills, decodes, self.config.decode_reserve_tokens)
        if placed is None:
            return False
        if request.patches:
            encoders = self.registry.of(Role.ENCODE)
            if not encoders:
                return False
            needs = self.patches.needs(request.patches.values(), encoders[0].info)
            acquired = self.patches.acquire(request, request.request_id, needs)
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
        ready = self.patches.readable(one for one in request.patches if one not in request.missing)
        frames = request.engine_frames
        self._send(prefill.peer_id, m.Prefill(request_id=request.request_id, ready=ready), frames)
        assert prefill.info.kv is not None
        self._send(decode.peer_id, m.Decode(request_id=request.request_id, prefill=prefill.info.kv), frames)
        return True

    def _dispatch(self, now: float) -> None:
        for job, worker in self.patches.dispatch(self.registry.of(Role.ENCODE), now):
            message = m.Encode(
                job_id=job.job_id,
                patch_hash=job.patch_hash,
                modality=job.modality,
                num_tokens=job.num_tokens,
                slot=job.slot,
            )
            self._send(worker.peer_id, message, job.frames)
            for holder in sorted(self.patches.index.holders(job.patch_hash)):
                if request := self.requests.get(holder):
                    request.tell(now, "encode", worker=worker.name, patch=job.patch_hash)

    def _encoded(self, worker: Peer, done: Done, message: m.Encoded, now: float) -> None:
        for holder in done.holders:
            request = self.requests.get(holder)
            if request is None:
                continue
            request.missing.discard(done.patch_hash)
            request.tell(
                now, "encoded", worker=worker.name, patch=done.patch_hash, took_s=message.took_s,
                detail=f"batch of {message.batch_size}",
            )  # fmt: skip
            reader = request.decode if request.prefilled else request.prefill
            self._send_ready(request, reader, [done.patch_hash])

    def _send_ready(self, request: Request, reader: str, patch_hashes: list[str]) -> None:
        if ready := self.patches.readable(patch_hashes):
            self._send(reader, m.Ready(request_id=request.request_id, ready=ready))

    def _prefilled(self, peer: Peer, request: Request, message: m.Prefilled, frames: list[bytes], now: float) -> None:
        request.move(Event.PREFILLED)
        request.prefilled = True
        detail = f"{message.num_cached_tokens} of {request.submit.num_prompt_tokens} tokens were cached"
        request.tell(now, "prefilled", worker=peer.name, took_s=message.took_s, detail=detail)
        self._frames_bytes -= request.frames_bytes
        request.patch_frames, request.engine_frames = {}, []
        self._send(request.decode, message)
        self._leave_prefill(request)
        peer.num_done += 1
        self._drop_unwanted(self.patches.release(request.request_id))
        if frames:
            self._send(request.endpoint, m.Tokens(request_id=request.request_id, num_new_tokens=0), frames)

    def _need_patches(self, request: Request, patch_hashes: list[str], now: float) -> None:
        """A decode worker has to prefill a preempted request itself: pin what is still in the cache for it."""
        wanted = [request.patches[patch_hash] for patch_hash in patch_hashes if patch_hash in request.patches]
        readable = self.patches.readable([patch.patch_hash for patch in wanted])
        encoders = self.registry.of(Role.ENCODE)
        request.tell(now, "preempted", detail=f"{len(readable)} of {len(wanted)} patches are in the cache")
        if len(readable) < len(wanted) or not encoders:
            self._fail(request, ErrorCode.PREEMPTED, "preempted, and its patches are not in the cache", now)
            return
        self.patches.acquire(request, request.request_id, self.patches.needs(wanted, encoders[0].info))
        self._send(request.decode, m.Ready(request_id=request.request_id, ready=readable))

    # ---- ends ------------------------------------------------------------------------------------------------------

    def _patch_lost(self, lost: Lost, code: ErrorCode, now: float) -> None:
        for holder in lost.holders:
            if request := self.requests.get(holder):
                self._fail(request, code, f"patch {lost.patch_hash[:8]}: {lost.reason}", now)

    def _fail(self, request: Request, code: ErrorCode, text: str, now: float, *, left: str = "") -> None:
        request.tell(now, "failed", detail=f"{code}: {text}")
        self._end(request, Event.FAIL, now, left=left)
        self._send(request.endpoint, _failed(request.request_id, code, text, request.story))

    def _end(self, request: Request, event: Event, now: float, *, left: str = "") -> None:
        """Ends a request: aborts the legs that still run and unpins its slots once nobody can be reading them.

        `left` is the peer that ended it and has already let go of it.
        """
        running = {request.prefill if not request.prefilled else "", request.decode} - {"", left}
        if event is Event.FINISH:
            running -= {request.decode}
        request.move(event)
        self._leave_prefill(request)
        if decode := self.registry.get(request.decode):
            decode.requests.discard(request.request_id)
            decode.load_tokens -= request.reserved_tokens
        self._frames_bytes -= request.frames_bytes
        del self.requests[request.request_id]
        self._count({Event.FINISH: "num_finished", Event.FAIL: "num_failed"}.get(event, "num_cancelled"))
        self._remember(request)
        alive = {peer_id for peer_id in running if self.registry.get(peer_id)}
        for peer_id in sorted(alive):
            self._send(peer_id, m.Abort(request_id=request.request_id))
        if alive:
            self._releasing[request.request_id] = alive
        else:
            self._drop_unwanted(self.patches.release(request.request_id))

    def _leave_prefill(self, request: Request) -> None:
        prefill = self.registry.get(request.prefill)
        if prefill and request.request_id in prefill.requests:
            prefill.requests.discard(request.request_id)
            prefill.load_tokens -= request.submit.num_prompt_tokens

    def _released(self, peer_id: str, request_id: str) -> None:
        waiting = self._releasing.get(request_id)
        if waiting is None or peer_id not in waiting:
            return
        waiting.discard(peer_id)
        if not waiting:
            del self._releasing[request_id]
            self._drop_unwanted(self.patches.release(request_id))

    def _drop_unwanted(self, jobs: list[Job]) -> None:
        for job in jobs:
            self._send(job.worker, m.DropEncode(job_id=job.job_id))

    # ---- small things ----------------------------------------------------------------------------------------------

    def _remember(self, request: Request) -> None:
        request_id = request.request_id
        self._stories[request_id] = m.Story(
            request_id=request_id, found=True, state=request.state, events=request.story
        )
        while len(self._stories) > self.config.story_keep:
            self._stories.popitem(last=False)

    def _story(self, request_id: str) -> m.Story:
        if request := self.requests.get(request_id):
            events = list(request.story)
            return m.Story(request_id=request_id, found=True, state=request.state, events=events)
        return self._stories.get(request_id) or m.Story(request_id=request_id, found=False)

    def _send(self, peer_id: str, message: Message, frames: list[bytes] | None = None) -> None:
        self._out.append(Send(peer_id, message, frames or []))

    def _take(self) -> list[Send]:
        out, self._out = self._out, []
        return out

    def _count(self, name: str) -> None:
        self._counts[name] += 1


def _failed(request_id: str, code: ErrorCode, text: str, story: list[m.StoryEvent] | None = None) -> m.Failed:
    status = HTTP_STATUS[code]
    retry_after_s = RETRY_AFTER_S if status in (429, 502, 503) else 0.0
    return m.Failed(
        request_id=request_id, code=code, message=text, status=status, retry_after_s=retry_after_s,
        story=story or [],
    )  # fmt: skip

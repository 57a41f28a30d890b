"""Requests on their way in: refused, queued, and started once everything that they need is available. Pure.

Part of the decision core. The queue is looked at only when something that its head may be waiting for has changed
(`broker.core.wake`).
"""

from __future__ import annotations

from collections.abc import Sequence

from broker.core.counts import Counts
from broker.core.endings import Endings, failed
from broker.core.holders import Keeper
from broker.core.journal import Journal
from broker.core.legs import Legs
from broker.core.liveness import NEEDED, Liveness, named
from broker.core.outbox import FrameLedger, Outbox
from broker.core.patches import Patches, PixelsNeededError, UnknownModalityError
from broker.core.peers import Peer, Stages
from broker.core.placement import place
from broker.core.queue import RequestQueue, kind_of
from broker.core.request import Leg, Request, State
from broker.core.timers import Timers
from broker.core.wake import Room, Wake
from cache.index import Acquired, Outcome, PatchNeed
from epd import messages as m
from epd.config import BrokerConfig
from epd.errors import ErrorCode
from epd.journal import Happening
from epd.messages import Stage


class Admission:
    """Admits requests to the queue, and starts them.

    Args:
        requests: all that are in flight, by id; those that are admitted are added.
        keeper: acts for their legs.
        journal: gets what happens to them.
    """

    def __init__(
        self,
        config: BrokerConfig,
        requests: dict[str, Request],
        queue: RequestQueue,
        wake: Wake,
        outbox: Outbox,
        stages: Stages,
        patches: Patches,
        liveness: Liveness,
        legs: Legs,
        ledger: FrameLedger,
        endings: Endings,
        timers: Timers,
        counts: Counts,
        keeper: Keeper,
        journal: Journal,
    ) -> None:
        self._config, self._requests, self._queue, self._wake, self._outbox = config, requests, queue, wake, outbox
        self._stages, self._patches, self._liveness, self._legs = stages, patches, liveness, legs
        self._ledger, self._endings, self._timers, self._counts = ledger, endings, timers, counts
        self._keeper, self._journal = keeper, journal

    # ---- in --------------------------------------------------------------------------------------------------------

    def submit(self, peer: Peer, submit: m.Submit, frames: Sequence[bytes], now: float) -> None:
        """SUBMIT: admits a request to the queue, or refuses it; a repeated SUBMIT changes nothing."""
        known = self._requests.get(submit.request_id)
        if known is not None and known.endpoint is peer:
            self._counts.num_fenced += 1
            return
        request = Request(submit, peer, frames, self._legs.first_id(submit), self._keeper, self._journal, now)
        refusal = self._refusal(request, now)
        if refusal is not None:
            self._counts.num_refused += 1
            self._outbox.send(peer.peer_id, failed(submit.request_id, *refusal))
            return
        if self._is_queue_full(submit) and (other := self._gives_way(submit.tenant)):
            text = "too many requests of this tenant are waiting, and another tenant needs a place"
            self._endings.fail(other, ErrorCode.OVERLOADED, text, now)
        self._admit(request, now)

    def _admit(self, request: Request, now: float) -> None:
        submit = request.submit
        self._counts.num_accepted += 1
        self._requests[request.request_id] = request
        request.endpoint.requests[request.request_id] = request
        self._legs.by_id[request.leg.leg_id] = request.leg
        self._ledger.hold(request.frames_bytes)
        request.timers.append(self._timers.set(request.deadline_at, lambda now: self._is_late(request, now)))
        self._watch_wait(request)
        detail = f"{submit.num_prompt_tokens} tokens, {len(request.patches)} patches"
        if submit.attempts:
            detail += f", tried {submit.attempts} times before, {len(submit.output_token_ids)} tokens are kept"
        request.tell(now, Happening.ACCEPTED, detail=detail)
        self._queue.put(request)

    def _refusal(self, request: Request, now: float) -> tuple[ErrorCode, str] | None:
        submit, config = request.submit, self._config
        if submit.request_id in self._requests:
            return ErrorCode.DUPLICATE, "a request with this id is in flight"
        if gone := self._liveness.gone(NEEDED[kind_of(request)], now):
            return ErrorCode.NOT_READY, f"{named(gone, 'no')} is registered"
        is_full = self._is_queue_full(submit) and self._gives_way(submit.tenant) is None
        if is_full or len(self._requests) >= config.max_in_flight:
            return ErrorCode.OVERLOADED, f"{len(self._requests)} requests are in flight"
        if not self._ledger.has_room(request.frames_bytes):
            return ErrorCode.OVERLOADED, f"{self._ledger.held_bytes} bytes of media are in flight"
        if reason := self._stages.too_large(request.num_tokens):
            return ErrorCode.TOO_LARGE, reason
        if request.num_tokens_left < 1:
            return ErrorCode.TOO_LARGE, "it already has all the tokens that it asked for"
        if submit.patches and self._patches.encode_info and self._patches.has_pools:
            try:
                needs = self._patches.needs(submit.patches, self._patches.encode_info)
                fits = self._patches.index.could_ever_fit(needs)
            except UnknownModalityError as error:
                return ErrorCode.UNSUPPORTED_MODALITY, str(error)
            except ValueError as error:  # an impossible shape
                return ErrorCode.TOO_LARGE, str(error)
            if not fits:
                return ErrorCode.TOO_LARGE, f"the embeddings of {len(needs)} patches do not fit the cache"
        return None

    def _is_queue_full(self, submit: m.Submit) -> bool:
        """Whether there is no place in the queue; a request that an earlier broker has admitted always gets one."""
        return not submit.attempts and len(self._queue) >= self._config.max_queued

    def _gives_way(self, tenant: str) -> Request | None:
        """The queued request that a new one of `tenant` would displace: the newest of the tenant with the most.

        None if that tenant would then have no more than `tenant`: displacing it would gain nothing in fairness.
        """
        longest = self._queue.newest_of_longest()
        if longest is None or self._queue.count(longest[0]) <= self._queue.count(tenant) + 1:
            return None
        return self._requests[longest[1]]

    # ---- waiting ---------------------------------------------------------------------------------------------------

    def _is_late(self, request: Request, now: float) -> None:
        if self._requests.get(request.request_id) is request:
            self._endings.fail(request, ErrorCode.DEADLINE, "the request's deadline has passed", now)

    def _watch_wait(self, request: Request) -> None:
        at = request.queued_at + self._config.max_queue_s
        request.timers.append(self._timers.set(at, lambda now: self._has_waited(request, now)))

    def _has_waited(self, request: Request, now: float) -> None:
        """Fails a request that has waited too long; one that has started may come back, so it is checked again."""
        if self._requests.get(request.request_id) is not request:
            return
        if request.state is State.QUEUED and now >= request.queued_at + self._config.max_queue_s:
            self._endings.fail(request, ErrorCode.OVERLOADED, "no worker became free in time", now)
        elif request.state is State.QUEUED:
            self._watch_wait(request)
        else:
            at = now + self._config.max_queue_s
            request.timers.append(self._timers.set(at, lambda now: self._has_waited(request, now)))

    def give_up_waiting(self, now: float) -> None:
        """Fails the requests that wait for something that has been absent for too long."""
        for kind, names in NEEDED.items():
            if gone := self._liveness.gone(names, now):
                for request in self._queue.of_kind(kind, self._requests):
                    self._fail_waiting(request, gone, now)
        encode = [str(Stage.ENCODE)]
        if self._liveness.gone(encode, now) and not self._stages.is_registered(Stage.ENCODE):
            waiting = [
                holder for job in self._patches.queue.waiting() for holder in self._patches.holders(job.patch_hash)
            ]
            for holder in waiting:
                if isinstance(holder, Leg) and self._requests.get(holder.request.request_id) is holder.request:
                    self._fail_waiting(holder.request, encode, now)

    def _fail_waiting(self, request: Request, gone: list[str], now: float) -> None:
        text = f"{named(gone, 'the last')} was lost, and none came in time"
        self._endings.fail(request, ErrorCode.WORKER_LOST, text, now)

    # ---- starting --------------------------------------------------------------------------------------------------

    def start_waiting(self, now: float) -> None:
        """Starts waiting requests in turn while there is room; those that need an absent stage are passed over."""
        if not self._wake.due:
            return
        # A head that does not fit ends the loop, although a smaller request behind it might fit: if small ones could
        # overtake, a large one would never find enough room at once. An absent stage is different: it may be away for
        # long, and what waits for it takes no room from the others.
        while (request_id := self._queue.next(self._liveness.blocked)) is not None:
            lacks = self._start(self._requests[request_id], now)
            if lacks is not None:
                self._wake.tried(lacks)
                return
            if request_id in self._queue:  # else it has failed
                self._queue.take(request_id)
        self._wake.tried(None)

    def _start(self, request: Request, now: float) -> Room | None:
        """Gives a queued request its workers and slots, all or nothing; returns what it lacks, if anything.

        Requests that held a part of what they need while waiting for the rest could block each other for ever (ADR 5).
        """
        patches = self._patches
        is_last = request.submit.prefill_samples and request.num_tokens_left == 1
        affinity = [*request.patches, *request.submit.prefix_hashes]
        placed = place(
            self._stages,
            request.num_tokens,
            min(request.num_tokens_left, self._config.decode_reserve_tokens),
            needs_decode=not is_last,
            host=patches.only_host(request.patches) if request.patches else None,
            affinity=affinity,
        )
        if isinstance(placed, Room):
            return placed
        missing: list[str] = []
        if request.patches:
            acquired = self._acquire(request, patches.pool_near(placed.prefill.host), now)
            if not isinstance(acquired, list):
                return acquired
            for item in acquired:
                if item.outcome is not Outcome.NEW:
                    what = Happening.CACHE_HIT if item.outcome is Outcome.HIT else Happening.COALESCED
                    request.tell(now, what, patch=item.patch_hash)
                if item.outcome is not Outcome.HIT:
                    missing.append(item.patch_hash)
        self._legs.begin(request, placed, missing, affinity, now)
        return None

    def _acquire(self, request: Request, prefer_pool: str | None, now: float) -> list[Acquired] | Room | None:
        """A request's slots; `Room.SLOTS` if it has to wait for them; None if it has failed."""
        patches = self._patches
        assert patches.encode_info is not None
        needs: list[PatchNeed] = []
        try:
            needs = patches.needs(request.patches.values(), patches.encode_info)
            acquired = patches.acquire(
                request.leg,
                request.patches,
                request.patch_frames,
                needs,
                deadline_at=request.deadline_at,
                prefer_pool=prefer_pool,
                tenant=request.submit.tenant,
            )
        except PixelsNeededError as error:
            self._endings.fail(request, ErrorCode.PIXELS_NEEDED, str(error), now)
            return None
        except UnknownModalityError as error:
            self._endings.fail(request, ErrorCode.UNSUPPORTED_MODALITY, str(error), now)
            return None
        except ValueError as error:  # another request has the same hash with another shape
            self._endings.fail(request, ErrorCode.TOO_LARGE, str(error), now)
            return None
        if acquired is not None:
            return acquired
        if patches.index.could_ever_fit(needs):
            return Room.SLOTS
        text = f"the embeddings of {len(needs)} patches do not fit the cache"
        self._endings.fail(request, ErrorCode.TOO_LARGE, text, now)
        return None

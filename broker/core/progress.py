"""What workers report of legs, and what becomes of the patches that legs wait for. Pure; part of the decision core."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from broker.core.answers import Answers
from broker.core.counts import Counts
from broker.core.endings import Endings
from broker.core.holders import Holder
from broker.core.legs import Legs
from broker.core.outbox import FrameLedger, Outbox
from broker.core.patches import Lost, Patches
from broker.core.peers import Peer, Registry, Worker
from broker.core.request import Event, Leg, Request, State
from broker.core.retry import Retries
from epd import messages as m
from epd.errors import ErrorCode
from epd.journal import Happening

Frames = Sequence[bytes]


class Progress:
    """Handles the messages of prefill and decode workers about their legs; the keeper of legs."""

    def __init__(
        self,
        outbox: Outbox,
        registry: Registry,
        patches: Patches,
        legs: Legs,
        ledger: FrameLedger,
        endings: Endings,
        retries: Retries,
        answers: Answers,
        counts: Counts,
    ) -> None:
        self._outbox, self._registry, self._patches, self._legs, self._ledger = (
            outbox, registry, patches, legs, ledger,
        )  # fmt: skip
        self._endings, self._retries, self._answers, self._counts = endings, retries, answers, counts

    # ---- prefill ---------------------------------------------------------------------------------------------------

    def prefilled(self, peer: Peer, message: m.Prefilled, frames: Frames, now: float) -> None:
        """PREFILLED: the prompt is computed; may carry a token, or the log-probabilities of the prompt."""
        leg = self._leg(peer, message.leg_id, is_end=True)
        if leg is None:
            return
        request, worker = leg.request, cast(Worker, peer)
        if leg.prefilled or not request.allows(Event.PREFILLED):
            self._counts.num_fenced += 1
            return
        self._ledger.let_go(request.prompt_done(message.num_cached_tokens))
        detail = f"{message.num_cached_tokens} of {leg.num_tokens} tokens were cached"
        request.tell(now, Happening.PREFILLED, worker=worker.name, took_s=message.took_s, detail=detail)
        worker.num_done += 1
        self._leave_patches(leg)
        if message.token_ids or message.finish_reason:
            self._answers.sampled(worker, request, message, frames, now)
        if leg.decode is not None and leg.decode.peer_id in self._registry and not message.finish_reason:
            self._outbox.send(leg.decode.peer_id, message)
        if frames and not message.token_ids:
            self._answers.prompt_output(request, frames)
        if leg.early_finish is not None:
            self._answers.finish(request, *leg.early_finish, now)

    def pushed(self, peer: Peer, message: m.Pushed, frames: Frames, now: float) -> None:
        """PUSHED: the KV is at the decode worker."""
        leg = self._leg(peer, message.leg_id)
        if leg is None:
            return
        if leg.pushed or not leg.request.allows(Event.PUSHED):
            self._counts.num_fenced += 1
            return
        leg.request.kv_there()
        leg.request.tell(now, Happening.PUSHED, worker=peer.name)
        self._legs.pushed(leg)

    def prefill_lost(self, leg: Leg) -> None:
        """The prefill worker is gone, but tokens show that the KV has reached the decode worker."""
        leg.request.kv_there()
        self._ledger.let_go(leg.request.prompt_done())
        self._leave_patches(leg)

    def _leave_patches(self, leg: Leg) -> None:
        """Nobody reads a leg's patches any more; its engine request is kept in case it needs another leg."""
        self._legs.leave_prefill(leg)
        self._legs.drop_patches(leg)
        if leg.pushed:
            self._legs.pushed(leg)

    # ---- decode ----------------------------------------------------------------------------------------------------

    def stepped(self, peer: Peer, message: m.StepOutputs, frames: Frames, now: float) -> None:
        """STEP_OUTPUTS: more tokens of many legs, and the last ones of some."""
        at = 0
        for output in message.outputs:
            end = at + output.num_frames
            self._output(peer, output, frames[at:end], now)
            at = end

    def _output(self, peer: Peer, output: m.LegOutput, frames: Frames, now: float) -> None:
        leg = self._leg(peer, output.leg_id, is_end=bool(output.finish_reason))
        if leg is None or not self._answers.follows(leg.request, output, now):
            return
        if not output.finish_reason:
            if leg.request.allows(Event.TOKENS):
                self._answers.decoded(cast(Worker, peer), leg, output, frames, now)
            else:
                self._counts.num_fenced += 1
        elif not leg.request.allows(Event.FINISH):
            self._counts.num_fenced += 1
        elif leg.prefilled:
            self._answers.finish(leg.request, output, frames, now, cast(Worker, peer))
        else:  # wait for PREFILLED, which may carry prompt log-probabilities
            leg.request.hold_finish(output, frames)

    def need_patches(self, peer: Peer, message: m.NeedPatches, frames: Frames, now: float) -> None:
        """NEED_PATCHES: decode has to prefill a preempted leg itself; what is still in the cache is pinned for it."""
        leg = self._leg(peer, message.leg_id)
        if leg is None:
            return
        if peer is not leg.decode:
            self._counts.num_fenced += 1
            return
        request = leg.request
        wanted = [request.patches[one] for one in message.patch_hashes if one in request.patches]
        readable = self._patches.readable([patch.patch_hash for patch in wanted])
        detail = f"{len(readable)} of {len(wanted)} patches are in the cache"
        request.tell(now, Happening.PREEMPTED, detail=detail)
        if len(readable) < len(wanted) or self._patches.encode_info is None:
            text = "preempted, and its patches are not in the cache"
            self._retries.again(request, ErrorCode.PREEMPTED, text, now)
            return
        needs = self._patches.needs(wanted, self._patches.encode_info)
        self._patches.acquire(leg, request.patches, {}, needs, deadline_at=request.deadline_at)
        self._outbox.send(peer.peer_id, m.Ready(leg_id=leg.leg_id, ready=readable))

    # ---- both ------------------------------------------------------------------------------------------------------

    def stale(self, peer: Peer, message: m.Stale, frames: Frames, now: float) -> None:
        """STALE: a slot does not hold what it should; its patch is encoded again."""
        leg = self._leg(peer, message.leg_id)
        if leg is None:
            return
        request, patch_hash = leg.request, message.patch_hash
        self._counts.num_stale += 1
        request.tell(now, Happening.STALE, worker=peer.name, patch=patch_hash, detail=message.reason)
        times, since = request.patch_stale(patch_hash, now)
        if self._patches.hopeless(times, since, now):
            text = f"patch {patch_hash[:8]} was not found in its slot {times} times: {message.reason}"
            self._endings.fail(request, ErrorCode.ENCODE_FAILED, text, now)
        elif lost := self._patches.stale(request, patch_hash, message.generation):
            tell_lost(lost, ErrorCode.ENCODE_FAILED, now)
        elif ready := self._patches.readable([patch_hash]):
            self._outbox.send(peer.peer_id, m.Ready(leg_id=leg.leg_id, ready=ready))

    def leg_failed(self, peer: Peer, message: m.LegFailed, frames: Frames, now: float) -> None:
        """LEG_FAILED: a worker cannot go on with a leg; if the request is not at fault, it is tried again."""
        leg = self._leg(peer, message.leg_id, is_end=True)
        if leg is None:
            return
        worker = cast(Worker, peer)
        code = ErrorCode(message.code) if message.code in set(ErrorCode) else ErrorCode.ENGINE_FAILED
        text = f"{peer.name}: {message.message}"
        if code in (ErrorCode.PREEMPTED, ErrorCode.WORKER_LOST):
            self._retries.again(leg.request, code, text, now, left=worker)
        else:
            self._endings.fail(leg.request, code, text, now, left=worker)

    def _leg(self, peer: Peer, leg_id: str, *, is_end: bool = False) -> Leg | None:
        """The leg with that id, if this worker is part of it; otherwise the message is too late, and fenced.

        `is_end`: with this message the worker has let go of the leg, so a late one counts as RELEASED.
        """
        leg = self._legs.by_id.get(leg_id)
        if leg is not None and (peer is leg.decode or peer is leg.prefill):
            return leg
        if not is_end or not self._legs.released(cast(Worker, peer), leg_id):
            self._counts.num_fenced += 1
        return None

    # ---- the keeper of legs ----------------------------------------------------------------------------------------

    def patch_given(self, holder: Holder, patch_hash: str, worker: str, now: float) -> None:
        """See `broker.core.holders.Keeper`, as for those below."""
        request = self._request(holder)
        if request is not None:
            request.tell(now, Happening.ENCODE, worker=worker, patch=patch_hash)

    def patches_there(
        self, holder: Holder, patch_hashes: Sequence[str], worker: str, took_s: float, batch: int, now: float
    ) -> None:
        """Tells the leg's reader."""
        request = self._request(holder)
        if request is None:
            return
        detail = f"batch of {batch}"
        for patch_hash in patch_hashes:
            request.patch_there(patch_hash)
            request.tell(now, Happening.ENCODED, worker=worker, patch=patch_hash, took_s=took_s, detail=detail)
        self._legs.send_ready(request.leg, self._patches.readable(patch_hashes))

    def patch_lost(
        self, holder: Holder, patch_hash: str, code: ErrorCode, reason: str, now: float, *, again: bool, blame: bool
    ) -> None:
        """The leg is tried again, or its request fails."""
        request = self._request(holder)
        if request is None:
            return
        text = f"patch {patch_hash[:8]}: {reason}"
        if again:
            self._retries.patch_lost(request.leg, text, now, blame)
        else:
            self._endings.fail(request, code, text, now)

    def _request(self, holder: Holder) -> Request | None:
        """The request whose current leg a holder is; None for a leg that has ended but may still be read."""
        leg = cast(Leg, holder)
        return leg.request if self._legs.by_id.get(leg.leg_id) is leg else None

    # ---- workers that are lost -------------------------------------------------------------------------------------

    def worker_lost(self, worker: Worker, leg: Leg, reason: str, now: float, *, blame: bool) -> None:
        """One of the two workers of a leg is gone."""
        request = leg.request
        text = f"{'decode' if worker is leg.decode else 'prefill'} worker {worker.name} was lost ({reason})"
        if leg.early_finish is not None:
            if worker is leg.prefill:  # PREFILLED will not come any more; if it is the decode worker, it will
                self._answers.finish(request, *leg.early_finish, now)
        elif worker is leg.decode:
            self._retries.again(request, ErrorCode.WORKER_LOST, text, now, blame=blame)
        elif leg.pushed:
            pass  # decode has all it needs
        elif request.state is State.DECODING and (leg.prefilled or not request.submit.resumable):
            self.prefill_lost(leg)
        else:  # also if the prompt's log-probabilities may have been lost
            self._retries.again(request, ErrorCode.WORKER_LOST, text, now, blame=blame)


def tell_lost(lost: Lost, code: ErrorCode, now: float, *, blame: bool = True) -> None:
    """Tells all holders of a patch that it will not come."""
    for holder in lost.holders:
        holder.keeper.patch_lost(
            holder, lost.patch_hash, code, lost.reason, now, again=lost.again, blame=blame
        )  # fmt: skip

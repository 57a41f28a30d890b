"""One request as the broker sees it: its state, its legs, what it holds, and its story. Pure.

There are two rules. The state of a request or a leg is written only by the methods here. And it changes only as
`TRANSITIONS` says: a change that is not listed for the current state raises, with the request's whole story. Whoever
handles a message asks `allows` first, and counts what is not allowed as fenced.

A **leg** is one attempt at a request: what one prefill and one decode worker do for it. A request that waits (QUEUED)
already has its next leg, which holds its slots.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from epd.journal import Happening
from epd.messages import LegOutput, Patch, StoryEvent, Submit

if TYPE_CHECKING:
    from broker.core.holders import Keeper
    from broker.core.journal import Journal
    from broker.core.peers import Peer, Worker
    from broker.core.timers import Timer

MAX_STORY_EVENTS = 4096


class State(enum.StrEnum):
    """Where a request is."""

    QUEUED = "queued"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Event(enum.StrEnum):
    """What can happen to a request."""

    START = "start"
    PREFILLED = "prefilled"
    PUSHED = "pushed"
    TOKENS = "tokens"
    FINISH = "finish"
    FAIL = "fail"
    CANCEL = "cancel"
    RETRY = "retry"


# A decode worker gets the KV from the prefill worker itself, so its first tokens may overtake PREFILLED and PUSHED.
TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.QUEUED, Event.START): State.PREFILLING,
    (State.QUEUED, Event.FAIL): State.FAILED,
    (State.QUEUED, Event.CANCEL): State.CANCELLED,
    (State.PREFILLING, Event.PREFILLED): State.PREFILLING,
    (State.PREFILLING, Event.PUSHED): State.PREFILLING,
    (State.PREFILLING, Event.TOKENS): State.DECODING,
    (State.PREFILLING, Event.FINISH): State.FINISHED,
    (State.PREFILLING, Event.FAIL): State.FAILED,
    (State.PREFILLING, Event.CANCEL): State.CANCELLED,
    (State.PREFILLING, Event.RETRY): State.QUEUED,
    (State.DECODING, Event.PREFILLED): State.DECODING,
    (State.DECODING, Event.PUSHED): State.DECODING,
    (State.DECODING, Event.TOKENS): State.DECODING,
    (State.DECODING, Event.FINISH): State.FINISHED,
    (State.DECODING, Event.FAIL): State.FAILED,
    (State.DECODING, Event.CANCEL): State.CANCELLED,
    (State.DECODING, Event.RETRY): State.QUEUED,
}


class InvalidTransitionError(RuntimeError):
    """A change that the request's state does not allow; the text tells the request's whole story."""


class Leg:
    """One attempt at a request, and a holder of slots (`broker.core.holders`).

    Attributes:
        leg_id: its name for the workers, which never see the same one twice.
        request: whose it is.
        prefill: the worker that computes the prompt; None before the leg has begun.
        decode: the worker that goes on after that; also None if prefill gives the only token that may come.
        num_tokens: how many tokens prefill computes: the prompt and the output of earlier legs.
        reserved_tokens: how many tokens of the decode worker's KV cache are set aside for it.
        missing: hashes of the patches that prefill still waits for.
        prefilled: the prompt is computed.
        num_cached_tokens: how much of it prefill had in its prefix cache; -1 until it has said so.
        pushed: the KV is at the decode worker.
        has_output: it has given tokens.
        early_finish: its last output, which overtook PREFILLED, with its frames.
    """

    __slots__ = (
        "decode",
        "early_finish",
        "has_output",
        "keeper",
        "leg_id",
        "missing",
        "num_cached_tokens",
        "num_tokens",
        "prefill",
        "prefilled",
        "pushed",
        "request",
        "reserved_tokens",
    )

    def __init__(self, leg_id: str, request: Request, keeper: Keeper) -> None:
        self.leg_id, self.request, self.keeper = leg_id, request, keeper
        self.prefill: Worker | None = None
        self.decode: Worker | None = None
        self.num_tokens = self.reserved_tokens = 0
        self.missing: set[str] = set()
        self.prefilled = self.pushed = self.has_output = False
        self.num_cached_tokens = -1
        self.early_finish: tuple[LegOutput, Sequence[bytes]] | None = None

    def __repr__(self) -> str:
        return f"Leg({self.leg_id!r})"

    def involves(self, worker: Peer) -> bool:
        """Whether a worker is part of it."""
        return worker is self.prefill or worker is self.decode

    @property
    def reader(self) -> Worker | None:
        """The worker that reads its patches: decode may have to, once prefill is done; None before it has begun."""
        return self.decode if self.prefilled else self.prefill


class Request:
    """A request in flight.

    Attributes:
        submit: the message with which its endpoint submitted it.
        endpoint: that endpoint.
        patches: its patches by hash.
        accepted_at, deadline_at: in seconds of the core's clock.
        queued_at: when it last began to wait.
        state: see `TRANSITIONS`.
        leg: its current leg, or its next one while it waits.
        engine_frames: go to the workers of every leg.
        patch_frames: pixels by hash, for whoever encodes a patch; kept until the prompt is computed.
        frames_bytes: bytes of all these frames.
        output_token_ids: all tokens that its client has received.
        num_losses: how many workers were lost with it, including those that its endpoint has counted.
        has_prompt_output: its endpoint has the prompt's log-probabilities.
        timers: to be stopped when it ends.
        story: what has happened to it.
    """

    __slots__ = (
        "_journal",
        "_stale",
        "accepted_at",
        "deadline_at",
        "endpoint",
        "engine_frames",
        "frames_bytes",
        "has_prompt_output",
        "leg",
        "num_losses",
        "output_token_ids",
        "patch_frames",
        "patches",
        "queued_at",
        "state",
        "story",
        "submit",
        "timers",
    )

    def __init__(
        self,
        submit: Submit,
        endpoint: Peer,
        frames: Sequence[bytes],
        leg_id: str,
        keeper: Keeper,
        journal: Journal,
        now: float,
    ) -> None:
        at = submit.num_engine_frames
        self.engine_frames = frames[:at]
        self.patch_frames: dict[str, Sequence[bytes]] = {}
        self.patches: dict[str, Patch] = {}
        for patch in submit.patches:
            self.patches[patch.patch_hash] = patch
            self.patch_frames[patch.patch_hash] = frames[at : at + patch.num_frames]
            at += patch.num_frames
        self.frames_bytes = sum(map(len, self.engine_frames)) + _size(self.patch_frames.values())
        self.submit, self.endpoint, self._journal = submit, endpoint, journal
        self.accepted_at = self.queued_at = now
        self.deadline_at = now + submit.deadline_s
        self.state = State.QUEUED
        self.leg = Leg(leg_id, self, keeper)
        self.output_token_ids = list(submit.output_token_ids)
        self.num_losses = submit.attempts
        self.has_prompt_output = False
        self.timers: list[Timer] = []
        self.story: list[StoryEvent] = []
        self._stale: dict[str, tuple[int, float]] = {}

    def __repr__(self) -> str:
        return f"Request({self.submit.request_id!r}, {self.state})"

    # ---- what it is ------------------------------------------------------------------------------------------------

    @property
    def request_id(self) -> str:
        """The id under which its endpoint knows it."""
        return self.submit.request_id

    @property
    def num_tokens(self) -> int:
        """Tokens to prefill: the prompt, and the output so far."""
        return self.submit.num_prompt_tokens + len(self.output_token_ids)

    @property
    def num_tokens_left(self) -> int:
        """Tokens of output that may still come."""
        return self.submit.max_tokens - len(self.output_token_ids)

    @property
    def cost(self) -> int:
        """How much of the pipeline it uses, for fairness: tokens to prefill and embedding rows to encode."""
        return self.submit.num_prompt_tokens + sum(patch.num_tokens for patch in self.patches.values())

    def allows(self, event: Event) -> bool:
        """Whether `event` is legal in the current state."""
        return (self.state, event) in TRANSITIONS

    # ---- what changes it -------------------------------------------------------------------------------------------

    def start(self, prefill: Worker, decode: Worker | None, reserved_tokens: int, missing: Iterable[str]) -> None:
        """Its leg begins: with these workers, while these patches are still to come."""
        self._move(Event.START)
        leg = self.leg
        leg.prefill, leg.decode = prefill, decode
        leg.num_tokens, leg.reserved_tokens = self.num_tokens, reserved_tokens
        leg.missing.update(missing)

    def patch_there(self, patch_hash: str) -> None:
        """A patch that its leg waits for can be read."""
        self.leg.missing.discard(patch_hash)

    def patch_stale(self, patch_hash: str, now: float) -> tuple[int, float]:
        """A patch was not found in its slot; returns how often that has happened by now, and since when."""
        times, since = self._stale.get(patch_hash, (0, now))
        found = self._stale[patch_hash] = times + 1, since
        return found

    def prompt_done(self, num_cached_tokens: int | None = None) -> int:
        """Its prompt is computed, and nobody needs its pixels; returns how many bytes were let go of.

        `num_cached_tokens` is what prefill says; None if PREFILLED has not come although the KV is there.
        """
        if num_cached_tokens is not None:
            self._move(Event.PREFILLED)
            self.leg.num_cached_tokens = num_cached_tokens
        self.leg.prefilled = True
        freed = _size(self.patch_frames.values())
        self.patch_frames = {}
        self.frames_bytes -= freed
        return freed

    def kv_there(self) -> None:
        """Its KV is at the decode worker."""
        self._move(Event.PUSHED)
        self.leg.pushed = True

    def prompt_output_sent(self) -> None:
        """Its endpoint has the log-probabilities of its prompt."""
        self.has_prompt_output = True

    def sampled(self, token_ids: Sequence[int]) -> None:
        """Prefill has sampled its next token."""
        self.leg.has_output = True
        self.output_token_ids += token_ids

    def decoded(self, token_ids: Sequence[int]) -> None:
        """Decode has given more tokens."""
        self._move(Event.TOKENS)
        self.sampled(token_ids)

    def hold_finish(self, output: LegOutput, frames: Sequence[bytes]) -> None:
        """Its last output has come before PREFILLED, which may carry log-probabilities of the prompt: it waits."""
        self.leg.early_finish = output, frames

    def finish(self, token_ids: Sequence[int]) -> None:
        """It has ended, with its last tokens."""
        self.sampled(token_ids)
        self._move(Event.FINISH)

    def fail(self) -> None:
        """It has ended without an answer."""
        self._move(Event.FAIL)

    def cancel(self) -> None:
        """Nobody wants it any more."""
        self._move(Event.CANCEL)

    def let_go(self) -> None:
        """It has ended: nobody needs its frames, nor what watched over it."""
        self.engine_frames, self.patch_frames, self.frames_bytes = (), {}, 0
        self.timers.clear()

    def blame(self) -> None:
        """A worker was lost with it, and it may be the cause."""
        self.num_losses += 1

    def next_leg(self, leg_id: str, now: float) -> None:
        """Waits again, for another leg."""
        self._move(Event.RETRY)
        self.queued_at = now
        self.leg = Leg(leg_id, self, self.leg.keeper)

    def _move(self, event: Event) -> None:
        try:
            self.state = TRANSITIONS[self.state, event]
        except KeyError:
            raise InvalidTransitionError(f"{event} in state {self.state}: {self.request_id}: {self.story}") from None

    # ---- its story -------------------------------------------------------------------------------------------------

    def tell(
        self, now: float, what: Happening, *, worker: str = "", patch: str = "", took_s: float = 0.0, detail: str = ""
    ) -> None:
        """Adds a line to the story, and to the journal: the one way into either."""
        event = StoryEvent(
            at_s=now - self.accepted_at, event=what, worker=worker, patch=patch, took_s=took_s, detail=detail
        )  # fmt: skip
        if len(self.story) < MAX_STORY_EVENTS:
            self.story.append(event)
        self._journal.told(self.submit.request_id, self.accepted_at, event)


def _size(frames: Iterable[Sequence[bytes]]) -> int:
    return sum(len(one) for each in frames for one in each)

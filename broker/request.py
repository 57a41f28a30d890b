"""One request as the broker sees it: its state, its legs, what it holds, and its story. Pure.

States and the events that move between them stand in `TRANSITIONS`; an event that is not listed for the state a
request is in changes nothing and is counted as fenced by the core.
"""

from __future__ import annotations

import dataclasses
import enum

from epd.messages import Finished, Patch, StoryEvent, Submit

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
    """An event that the request's state does not allow; the text tells the request's whole story."""


@dataclasses.dataclass(slots=True, eq=False)
class Request:
    """A request in flight.

    `leg_id` names the present attempt towards the workers, who never see one twice; `num_losses` counts the workers
    that were lost with this request, and the attempts that its endpoint has counted. `engine_frames` go to the prefill
    and the decode worker of every leg; `patch_frames` (by hash) to whoever encodes a patch, and are kept until the
    prompt is computed so that a patch can be encoded again. `output_token_ids` is all that its client has got.
    `queued_at` is when it last began to wait, `not_before` when it may start. `missing` are the hashes that the
    prefill worker still waits for; `num_cached_tokens` is how much of the prompt it had computed before, -1 until it
    has said so. `early_finish` is a FINISHED that overtook PREFILLED, with its frames.
    `has_prompt_output` says that the endpoint has the prompt's log-probabilities, `leg_has_output` that the present leg
    has given tokens; `stale` says by hash how often a patch was not found in its slot, and since when.
    """

    submit: Submit
    endpoint: str
    accepted_at: float
    deadline_at: float
    engine_frames: list[bytes]
    patch_frames: dict[str, list[bytes]]
    patches: dict[str, Patch]
    leg_id: str
    output_token_ids: list[int]
    num_losses: int = 0
    queued_at: float = 0.0
    not_before: float = 0.0
    state: State = State.QUEUED
    prefill: str = ""
    decode: str = ""
    prompt_tokens: int = 0
    reserved_tokens: int = 0
    missing: set[str] = dataclasses.field(default_factory=set)
    prefilled: bool = False
    num_cached_tokens: int = -1
    pushed: bool = False
    early_finish: tuple[Finished, list[bytes]] | None = None
    has_prompt_output: bool = False
    leg_has_output: bool = False
    stale: dict[str, tuple[int, float]] = dataclasses.field(default_factory=dict)
    story: list[StoryEvent] = dataclasses.field(default_factory=list)

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
        """What it takes of the pipeline, for fairness: tokens to prefill and embedding rows to encode."""
        return self.submit.num_prompt_tokens + sum(patch.num_tokens for patch in self.patches.values())

    @property
    def frames_bytes(self) -> int:
        """Bytes of opaque frames held for this request."""
        return sum(map(len, self.engine_frames)) + sum(len(f) for fs in self.patch_frames.values() for f in fs)

    def new_leg(self, leg_id: str) -> None:
        """Waits again, for another leg; what the earlier one had is forgotten.

        Raises:
            InvalidTransitionError: it waits already, or has ended.
        """
        self.move(Event.RETRY)
        self.leg_id, self.prefill, self.decode = leg_id, "", ""
        self.prompt_tokens = self.reserved_tokens = 0
        self.missing, self.prefilled, self.pushed, self.early_finish = set(), False, False, None
        self.num_cached_tokens, self.leg_has_output = -1, False

    def allows(self, event: Event) -> bool:
        """Whether `event` is legal in the present state."""
        return (self.state, event) in TRANSITIONS

    def move(self, event: Event) -> None:
        """Changes the state as `TRANSITIONS` says.

        Raises:
            InvalidTransitionError: `event` is not legal now.
        """
        try:
            self.state = TRANSITIONS[self.state, event]
        except KeyError:
            raise InvalidTransitionError(f"{event} in state {self.state}: {self.request_id}: {self.story}") from None

    def tell(
        self, now: float, event: str, *, worker: str = "", patch: str = "", took_s: float = 0.0, detail: str = ""
    ) -> None:
        """Adds a line to the story."""
        if len(self.story) < MAX_STORY_EVENTS:
            self.story.append(
                StoryEvent(
                    at_s=now - self.accepted_at,
                    event=event,
                    worker=worker,
                    patch=patch,
                    took_s=took_s,
                    detail=detail,
                )
            )

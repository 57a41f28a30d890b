"""One request as the broker sees it: its state, its two legs, what it holds, and its story. Pure.

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
    (State.DECODING, Event.PREFILLED): State.DECODING,
    (State.DECODING, Event.PUSHED): State.DECODING,
    (State.DECODING, Event.TOKENS): State.DECODING,
    (State.DECODING, Event.FINISH): State.FINISHED,
    (State.DECODING, Event.FAIL): State.FAILED,
    (State.DECODING, Event.CANCEL): State.CANCELLED,
}


class InvalidTransitionError(RuntimeError):
    """An event that the request's state does not allow; the text tells the request's whole story."""


@dataclasses.dataclass(slots=True, eq=False)
class Request:
    """A request in flight.

    `engine_frames` go to the prefill and the decode worker; `patch_frames` (by hash) to whoever encodes a patch, and
    are kept until the prompt is computed so that a patch can be encoded again. `missing` are the hashes that the
    prefill worker still waits for. `num_cached_tokens` is how much of the prompt it had computed before, -1 until it
    has said so. `early_finish` is a FINISHED that overtook PREFILLED, with its frames.
    """

    submit: Submit
    endpoint: str
    accepted_at: float
    deadline_at: float
    engine_frames: list[bytes]
    patch_frames: dict[str, list[bytes]]
    patches: dict[str, Patch]
    state: State = State.QUEUED
    prefill: str = ""
    decode: str = ""
    reserved_tokens: int = 0
    missing: set[str] = dataclasses.field(default_factory=set)
    prefilled: bool = False
    num_cached_tokens: int = -1
    pushed: bool = False
    num_tokens_out: int = 0
    early_finish: tuple[Finished, list[bytes]] | None = None
    story: list[StoryEvent] = dataclasses.field(default_factory=list)

    @property
    def request_id(self) -> str:
        """The id under which prefill and decode find each other."""
        return self.submit.request_id

    @property
    def frames_bytes(self) -> int:
        """Bytes of opaque frames held for this request."""
        return sum(map(len, self.engine_frames)) + sum(len(f) for fs in self.patch_frames.values() for f in fs)

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

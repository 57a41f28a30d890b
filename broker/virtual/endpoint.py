"""An endpoint in virtual time: submits requests, and holds them as `epd.endpoint.engine.flights` does. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import msgspec

from broker.virtual.link import Peer
from epd import messages as m
from epd.messages import Kind, Message, RequestOutput, Submit

if TYPE_CHECKING:
    from broker.virtual.network import Network

FINISHED, CANCELLED, CONNECTION_LOST = "finished", "cancelled", "connection lost"
MAX_RESTARTS = 3
_LOOK_EVERY_S = 1.0
# How much later than the broker the endpoint gives up, so that the broker says so first, with its reason.
_GRACE_S = 5.0


class Flight:
    """A request, what its client has got, and when.

    Args:
        submit: what is submitted, without earlier results.
        frames: go with it.

    Attributes:
        tokens: all that the client has received.
        end: how it ended: one of the names above, or an error's code; empty until then.
        attempts: how often it was submitted.
        asked_at: when its client asked; it has `submit.deadline_s` from then on.
        first_at, ended_at: when the first token and the end came; NaN before that.
    """

    __slots__ = ("asked_at", "attempts", "end", "ended_at", "first_at", "frames", "submit", "tokens")

    def __init__(self, submit: Submit, frames: Sequence[bytes]) -> None:
        self.submit, self.frames = submit, frames
        self.tokens: list[int] = []
        self.end = ""
        self.attempts = 0
        self.asked_at = self.first_at = self.ended_at = math.nan

    def __repr__(self) -> str:
        return f"Flight({self.request_id!r}, {len(self.tokens)} tokens, {self.end or 'in flight'})"

    @property
    def request_id(self) -> str:
        """Its id."""
        return self.submit.request_id

    @property
    def deadline_at(self) -> float:
        """When it fails."""
        return self.asked_at + self.submit.deadline_s


class Endpoint(Peer):
    """Submits requests, and does so again if the broker is lost or tokens are missing.

    Attributes:
        flights: those that have not ended, by id.
        on_end: called for each that ends.
    """

    role = Kind.ENDPOINT

    def __init__(self, network: Network, name: str, host: str = "h", restart_s: float | None = 2.0) -> None:
        super().__init__(network, name, host, restart_s)
        self.flights: dict[str, Flight] = {}
        self.on_end: Callable[[Flight], None] = lambda flight: None

    def start(self) -> None:
        """Begins a life with no requests."""
        self.flights = {}
        self._look()
        super().start()

    def died(self) -> None:
        """Its clients' connections are lost."""
        super().died()
        for flight in list(self.flights.values()):
            self._ended(flight, CONNECTION_LOST)

    # ---- clients ---------------------------------------------------------------------------------------------------

    def ask(self, flight: Flight) -> None:
        """A client sends a request."""
        flight.asked_at = self.clock.now
        if not self.alive:
            self._ended(flight, CONNECTION_LOST)
            return
        self.flights[flight.request_id] = flight
        if self.registered:
            self._submit(flight)

    def cancel(self, flight: Flight) -> None:
        """A client goes away."""
        self.say(m.Cancel(request_id=flight.request_id))
        self._ended(flight, CANCELLED)

    def _submit(self, flight: Flight) -> None:
        left_s = max(flight.deadline_at - self.clock.now, 0.001)
        submit = msgspec.structs.replace(
            flight.submit, deadline_s=left_s, attempts=flight.attempts, output_token_ids=list(flight.tokens)
        )  # fmt: skip
        flight.attempts += 1
        self.say(submit, flight.frames)

    def _submit_rest(self, flight: Flight) -> None:
        """Tokens are missing: from the last one that is there."""
        self.say(m.Cancel(request_id=flight.request_id))
        if flight.attempts > MAX_RESTARTS or (flight.tokens and not flight.submit.resumable):
            self._ended(flight, "engine_failed")
        else:
            self._submit(flight)

    def _ended(self, flight: Flight, end: str) -> None:
        if not flight.end:
            flight.end, flight.ended_at = end, self.clock.now
            self.flights.pop(flight.request_id, None)
            self.on_end(flight)

    def _look(self) -> None:
        """Gives up requests that the broker has forgotten to end."""
        for flight in [one for one in self.flights.values() if self.clock.now > one.deadline_at + _GRACE_S]:
            self.say(m.Cancel(request_id=flight.request_id))
            self._ended(flight, "deadline_exceeded")
        self.later(_LOOK_EVERY_S, self._look)

    # ---- the broker ------------------------------------------------------------------------------------------------

    def welcomed(self, welcome: m.Welcome) -> None:
        """Submits all that has not ended to the new broker."""
        for flight in list(self.flights.values()):
            self._submit(flight)

    def lost(self, reason: str) -> None:
        """The broker is lost: ends what cannot be continued elsewhere."""
        for flight in list(self.flights.values()):
            if flight.tokens and not flight.submit.resumable:
                self._ended(flight, "broker_lost")

    def take(self, message: Message, frames: Sequence[bytes]) -> None:
        """Tokens, and ends."""
        if isinstance(message, m.Outputs):
            at = 0
            for output in message.outputs:
                self._take_output(output, frames[at : at + output.num_frames])
                at += output.num_frames
        elif isinstance(message, m.Failed) and (flight := self.flights.get(message.request_id)):
            self._ended(flight, message.code)

    def _take_output(self, output: RequestOutput, frames: Sequence[bytes]) -> None:
        flight = self.flights.get(output.request_id)
        if flight is None:
            return
        if output.num_before > len(flight.tokens):
            self._submit_rest(flight)
        elif output.num_before in (-1, len(flight.tokens)):
            if not flight.tokens:
                flight.first_at = self.clock.now
            flight.tokens += self.tokens_of(output, frames)
            if output.finish_reason:
                self._ended(flight, FINISHED)

    def tokens_of(self, output: RequestOutput, frames: Sequence[bytes]) -> list[int]:
        """The tokens that an output brings."""
        return output.token_ids

"""The requests in flight: sent to the broker, sent again when there is a new one, and ended, each exactly once.

Lives in the endpoint process, on its event loop; owns the flights. A part of the engine client, written against vLLM
0.32 (`vllm.v1.engine.output_processor`).

A request outlives the broker. The request and its patches' frames are held until it ends. While there is no broker it
waits, for at most `broker_wait_s`, and the next broker gets it with the tokens that it has so far (ADR 10).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from http import HTTPStatus
from typing import Any

import structlog
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.output_processor import OutputProcessor

from epd.config import EndpointConfig
from epd.endpoint.engine.flight import Flight, IncompleteOutputError
from epd.endpoint.engine.outputs import OutputReader, num_bytes
from epd.endpoint.engine.submission import PipelineError, prefix_hashes, submission, too_large, without_pixels
from epd.endpoint.http.exchange import Exchange
from epd.endpoint.http.failures import Failure, failure_of
from epd.endpoint.http.keys import tenant_of
from epd.endpoint.ops.stories import Stories
from epd.errors import ErrorCode
from epd.messages import Cancel, Failed, Message, RequestOutput, StoryEvent
from epd.multimodal.splitter import Split
from epd.process.bounded import Beliefs

log = structlog.get_logger()

# The broker ends a request at its deadline; if it does not, the endpoint does so this much later.
_DEADLINE_GRACE_S = 5.0
# If the same broker needs a request again more often, for its pixels or after lost tokens, sending it does not help.
_MAX_RESTARTS = 3
_ERROR_STATUSES = {status for status in HTTPStatus if status >= 400} | {code.status for code in ErrorCode}

Send = Callable[[Message, Sequence[Any]], bool]


class Flights:
    """All requests in flight.

    Args:
        config: the limits.
        send: sends to the broker; false if its outbox is full.
        beliefs: which patches are in the broker's cache.
        stories: told of each beginning and end.
        may_resume: whether requests with tokens may be continued elsewhere at all.
        prefill_samples: whether prefill workers may sample first tokens at all.
        names_prefixes: whether the broker is told what prompts begin with.

    Attributes:
        processor: vLLM's output processor whose requests these are.
        outputs: what it gets next; None only wakes it.
        held_bytes: how much is held to send requests again.
    """

    processor: OutputProcessor

    def __init__(
        self,
        config: EndpointConfig,
        send: Send,
        beliefs: Beliefs,
        stories: Stories,
        *,
        may_resume: bool = True,
        prefill_samples: bool = True,
        names_prefixes: bool = False,
    ) -> None:
        self._config, self._send, self._beliefs, self._stories = config, send, beliefs, stories
        self._names_prefixes = names_prefixes
        self._options = {"may_resume": may_resume, "prefill_samples": prefill_samples}
        self._reader = OutputReader()
        self._flights: dict[str, Flight] = {}
        self._has_broker = False
        self.outputs: asyncio.Queue[EngineCoreOutput | None] = asyncio.Queue()
        self.held_bytes = 0

    def __len__(self) -> int:
        return len(self._flights)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._flights

    @property
    def num_running(self) -> int:
        """How many have given output."""
        return sum(flight.has_output for flight in list(self._flights.values()))

    @property
    def num_waiting(self) -> int:
        """How many wait for a broker."""
        return sum(not flight.sent for flight in list(self._flights.values()))

    # --- beginnings

    def check_room(self) -> None:
        """Refuses a request that may not even wait.

        Raises:
            PipelineError: there is no broker, and as many requests as allowed wait for one; HTTP 503.
        """
        if self._has_broker:
            return
        config = self._config
        has_room = self.num_waiting < config.max_waiting and self.held_bytes < config.max_held_bytes
        if config.broker_wait_s <= 0 or not has_room:
            raise PipelineError(failure_of(ErrorCode.NOT_READY, "the broker cannot be reached"))

    def submit(self, request: EngineCoreRequest, parts: Split, exchange: Exchange | None) -> None:
        """Accepts a request: sends it, or lets it wait for a broker.

        Raises:
            PipelineError: it cannot be sent; nothing of it remains.
        """
        flight = Flight(without_pixels(request, parts), parts, exchange=exchange, **self._options)
        self._flights[flight.request_id] = flight
        self.held_bytes += flight.num_bytes
        owner, name = (exchange.owner, exchange.name) if exchange is not None else ("", "")
        self._stories.open(flight.request_id, flight.part.client_id, owner, name)
        if exchange is not None:
            exchange.parts.append(flight.part)
        deadline_s = self._config.request_timeout_s + _DEADLINE_GRACE_S
        self._after(deadline_s, flight, "deadline", self._on_deadline)
        if not self._has_broker:
            self._after(self._config.broker_wait_s, flight, "broker", self._on_no_broker)
            return
        try:
            failure = self._send_off(flight)
            if failure is not None:
                raise PipelineError(failure)
        except Exception as error:
            self.end(flight.request_id)
            self._stories.close(flight.request_id, "failed", str(error))
            raise

    def _send_off(self, flight: Flight) -> Failure | None:
        """Sends a request, the first time without pixels that should not be needed; returns why it cannot be sent."""
        assert flight.parts is not None
        parts = flight.parts if flight.attempts else flight.parts.without(self._beliefs)
        owner = flight.exchange.owner if flight.exchange is not None else ""
        submit, frames = submission(
            flight.request,
            parts,
            deadline_s=max(flight.left_s(self._config.request_timeout_s), 0.001),
            tenant=tenant_of(owner, flight.request.cache_salt),
            attempts=flight.attempts,
            output_token_ids=list(flight.token_ids),
            resumable=flight.resumable,
            prefill_samples=flight.prefill_samples,
            prefix_hashes=prefix_hashes(flight.request) if self._names_prefixes else [],
        )
        reason = too_large(frames)
        if reason:
            return failure_of(ErrorCode.TOO_LARGE, reason)
        if not self._send(submit, frames):
            return failure_of(ErrorCode.OVERLOADED, "too many messages wait for the broker")
        flight.sent, flight.begun, flight.attempts = True, False, flight.attempts + 1
        flight.stop_timer("broker")
        return None

    # --- the broker comes and goes

    def on_registered(self) -> None:
        """Sends everything in flight to the new broker, which knows nothing."""
        self._has_broker = True
        for flight in list(self._flights.values()):
            if flight.request_id in self._flights and not flight.sent:
                self._again(flight)

    def on_lost(self, reason: str) -> None:
        """The broker is gone; requests that can be sent again wait for the next one."""
        self._has_broker = False
        for flight in list(self._flights.values()):
            if flight.request_id not in self._flights:
                continue  # a sibling has failed
            if self._config.broker_wait_s > 0 and flight.start_over():
                self._after(self._config.broker_wait_s, flight, "broker", self._on_no_broker)
            else:
                failure = failure_of(ErrorCode.BROKER_LOST, f"the broker was lost: {reason}")
                self.fail(flight.request_id, failure)

    def _on_no_broker(self, request_id: str) -> None:
        text = f"no broker for {self._config.broker_wait_s:g} s"
        code = ErrorCode.BROKER_LOST if self._flights[request_id].attempts else ErrorCode.NOT_READY
        self.fail(request_id, failure_of(code, text))

    def _again(self, flight: Flight) -> None:
        failure = self._send_off(flight)
        if failure is not None:
            self.fail(flight.request_id, failure)

    # --- what the broker says

    def on_failed(self, message: Failed) -> None:
        """A request has failed, or is sent again with the pixels that it lacked."""
        flight = self._flights.get(message.request_id)
        if flight is not None and message.code == ErrorCode.PIXELS_NEEDED:
            self._beliefs.forget(flight.patches)
            if self._goes_on(flight):
                return
        failure = Failure(
            code=message.code,
            message=message.message,
            status=message.status if message.status in _ERROR_STATUSES else 500,
            retry_after_s=message.retry_after_s,
        )
        self.fail(message.request_id, failure, message.story)

    def on_output(self, message: RequestOutput, frames: list[bytes]) -> bool:
        """Queues an output; false if the request is unknown, has it already, or fails because of it."""
        request_id, is_last = message.request_id, bool(message.finish_reason)
        is_partial = not is_last and not message.token_ids
        flight = self._flights.get(request_id)
        if flight is None or not self._follows(flight, message):
            return False
        flight.part.num_cached_tokens = message.num_cached_tokens
        try:
            output = self._reader.read(message, frames)
            if is_last and not output.finished:
                raise IncompleteOutputError("the last output has no finish reason")
            if not is_partial and not flight.begun:
                self._on_first(flight)
            ready = flight.partial(output) if is_partial else flight.output(output)
        except Exception as error:
            if not isinstance(error, IncompleteOutputError):
                log.exception("an output could not be read", request_id=request_id)
            self.give_up(request_id, ErrorCode.ENGINE_FAILED, f"unreadable output: {error}")
            return False
        for each in ready:
            self.outputs.put_nowait(each)
        return is_last or self._is_read(flight, num_bytes(message, frames))

    def _follows(self, flight: Flight, message: RequestOutput) -> bool:
        """Whether these tokens are the next ones; after a gap the request goes on from the last token it has."""
        num_tokens, num_before = len(flight.token_ids), message.num_before
        if num_before in (-1, num_tokens):
            return True
        if num_before > num_tokens:
            log.warning("tokens are missing", request_id=flight.request_id, num_tokens=num_tokens, at=num_before)
            self._send(Cancel(request_id=flight.request_id), ())
            if not self._goes_on(flight):
                failure = failure_of(ErrorCode.ENGINE_FAILED, "tokens were lost on the way")
                self.fail(flight.request_id, failure)
        return False

    def _goes_on(self, flight: Flight) -> bool:
        """Sends a request again that the broker no longer has; false if that is not allowed."""
        flight.num_restarts += 1
        if flight.num_restarts > _MAX_RESTARTS or not flight.start_over():
            return False
        self._again(flight)
        return True

    def _on_first(self, flight: Flight) -> None:
        """Notes that the workers have given tokens, so its patches are in the cache."""
        flight.begun = True
        self._beliefs.add(flight.patches)
        if self.held_bytes > self._config.max_held_bytes:
            self._let_go(flight)

    def _is_read(self, flight: Flight, num_bytes: int) -> bool:
        """Whether its client keeps up; if not, the request ends here, since vLLM would collect all output for it."""
        state = self.processor.request_states.get(flight.request_id)
        if state is None or state.queue is None or state.queue.output is None:
            flight.unread_bytes = 0
        flight.unread_bytes += num_bytes
        if flight.unread_bytes <= self._config.max_unread_bytes:
            return True
        self.give_up(flight.request_id, ErrorCode.SLOW_CLIENT, "the client does not read its stream")
        return False

    # --- ends

    def end(self, request_id: str) -> Flight | None:
        """Takes a request out of flight; None if it is not in flight."""
        flight = self._flights.pop(request_id, None)
        if flight is not None:
            self._let_go(flight)
            for name in list(flight.timers):
                flight.stop_timer(name)
        return flight

    def cancel(self, request_id: str, reason: str) -> bool:
        """Ends a request that nobody waits for any more; false if it is not in flight."""
        if self.end(request_id) is None:
            return False
        self._send(Cancel(request_id=request_id, reason=reason), ())
        self._stories.close(request_id, "finished" if reason == "stop" else "cancelled", reason)
        return True

    def cancel_all(self, request_ids: Iterable[str]) -> int:
        """Ends the ones that are in flight with `cancelled`, which their callers get; returns how many."""
        ids = [request_id for request_id in request_ids if request_id in self._flights]
        for request_id in ids:
            if request_id in self._flights:
                self._stories.close(request_id, "cancelled", "by request")
                self.give_up(request_id, ErrorCode.CANCELLED, "cancelled by request")
        return len(ids)

    def give_up(self, request_id: str, code: ErrorCode, message: str) -> None:
        """Ends a request that the broker still has."""
        self._send(Cancel(request_id=request_id), ())
        self.fail(request_id, failure_of(code, message))

    def fail_all(self, failure: Failure) -> None:
        """Ends all requests with `failure`."""
        for request_id in list(self._flights):
            self.fail(request_id, failure)

    def fail(self, request_id: str, failure: Failure, story: list[StoryEvent] | None = None) -> None:
        """Ends a request and its siblings with `failure`: their caller gets it, and nothing of them remains."""
        self._stories.close(request_id, "failed", str(failure), story or ())
        flight = self.end(request_id)
        if flight is None:
            return
        if flight.exchange is not None:
            flight.exchange.note(failure)
        state = self.processor.request_states.get(request_id)
        if state is not None:
            whole = state.parent_req.request_id if state.parent_req is not None else request_id
            for sibling in self.processor.abort_requests([whole], internal=True):
                if self.end(sibling) is not None:
                    self._send(Cancel(request_id=sibling), ())
                    self._stories.close(sibling, "cancelled", f"{request_id} failed")
            if state.queue is not None:
                state.queue.put(PipelineError(failure))
        self.outputs.put_nowait(None)  # so that the gauges of vLLM's metrics follow

    def _on_deadline(self, request_id: str) -> None:
        self.give_up(request_id, ErrorCode.DEADLINE, "the request took too long")

    def _after(self, delay_s: float, flight: Flight, name: str, call: Callable[[str], None]) -> None:
        flight.stop_timer(name)
        flight.timers[name] = asyncio.get_running_loop().call_later(delay_s, call, flight.request_id)

    def _let_go(self, flight: Flight) -> None:
        """Releases what is held to send a request again."""
        if flight.parts is not None:
            flight.parts = None
            self.held_bytes -= flight.num_bytes

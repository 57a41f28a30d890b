"""The pipeline behind the broker as vLLM's engine core.

Lives in the endpoint process; owns the link to the broker and the requests in flight. Written against vLLM 0.32
(`vllm.v1.engine.async_llm`, `core_client`, `output_processor`): rendering, detokenizing, n > 1, stop strings and
log-probabilities are vLLM's own code, unchanged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import structlog
from vllm.config import VllmConfig
from vllm.exceptions import VLLMError
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder

from epd.bounded import Beliefs
from epd.config import Config
from epd.endpoint.adapters import AdapterChecks
from epd.endpoint.failures import Failure, current_exchange, failure_of
from epd.endpoint.flight import Flight, IncompleteOutputError
from epd.endpoint.questions import Questions
from epd.endpoint.stories import Stories
from epd.endpoint.submission import PipelineError, check_request, submission, too_large, wants_prompt_logprobs
from epd.endpoint.uploads import Uploads
from epd.errors import ErrorCode
from epd.link import BrokerLink, LinkOverloadedError
from epd.messages import (
    CacheState,
    Cancel,
    Failed,
    Finished,
    GetCache,
    GetStory,
    Message,
    Role,
    Status,
    Story,
    StoryEvent,
    Tokens,
    Uploaded,
    Welcome,
)
from epd.multimodal.splitter import Split, Splitter

log = structlog.get_logger()

# The broker ends a request at its deadline; the endpoint does so where the broker has not.
_DEADLINE_GRACE_S = 5.0
_MIN_SPLIT_BYTES = 64 << 20
_ERROR_STATUSES = frozenset(status for status in HTTPStatus if status >= 400)


class PipelineCore(AdapterChecks, EngineCoreClient):
    """What `AsyncLLM` takes for its engine core: requests go to the broker, outputs come from there.

    Enter `link` (an async context manager) before the first request. Everything runs on one event loop.
    """

    engine_ranks_managed = (0,)

    def __init__(self, config: Config, vllm_config: VllmConfig, name: str) -> None:
        self._config, self._vllm_config = config, vllm_config
        self.splitter = Splitter(vllm_config, _split_bytes(vllm_config))
        self.beliefs = Beliefs()
        self.uploads = Uploads(config.endpoint, self.beliefs, self._send)
        self._decoder = MsgpackDecoder(EngineCoreOutput)
        self._outputs: asyncio.Queue[EngineCoreOutput | None] = asyncio.Queue()
        self._flights: dict[str, Flight] = {}
        self._exchanges: dict[str, Any] = {}
        self.status_changed = asyncio.Event()
        self._stories_asked: Questions[Story] = Questions()
        self._cache_asked: Questions[CacheState] = Questions()
        self._processor: OutputProcessor | None = None
        self.resources = SimpleNamespace(engine_dead=False)
        self.stories = Stories(config.broker.story_keep)
        self.status: Status | None = None
        self.draining = False
        self.output_task: asyncio.Task[None] | None = None
        self.link = BrokerLink(
            config.broker.address,
            name,
            Role.ENDPOINT,
            on_message=self.on_message,
            on_registered=self.on_registered,
            on_lost=self.on_lost,
        )

    def attach(self, processor: OutputProcessor) -> None:
        """Names the output processor whose requests these are; done by `PipelineLLM`."""
        self._processor = processor

    @property
    def num_in_flight(self) -> int:
        """Requests submitted and not ended."""
        return len(self._flights)

    # --- vLLM's side

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        """Generation only."""
        return ("generate",)

    async def get_output_async(self) -> EngineCoreOutputs:
        """Waits for output and returns all that has come."""
        batch = [await self._outputs.get()]
        while not self._outputs.empty():
            batch.append(self._outputs.get_nowait())
        num_running = sum(flight.has_output for flight in self._flights.values())
        stats = SchedulerStats(num_running_reqs=num_running, num_waiting_reqs=len(self._flights) - num_running)
        return EngineCoreOutputs(outputs=[each for each in batch if each is not None], scheduler_stats=stats)

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Submits one request.

        Raises:
            PipelineError: the pipeline cannot take it now; HTTP 503.
            VLLMValidationError: it asks for what the pipeline does not do; HTTP 400.
        """
        if request.abort_immediately:
            return
        try:
            self._check(request)
            parts = await self._split(request)
            self._submit(request, parts)
        except BaseException as error:
            self._forget(request.request_id)
            if isinstance(error, PipelineError):
                self._note(current_exchange.get(), error.failure)
            elif isinstance(error, VLLMError):
                note = Failure(code="invalid_request", message=str(error), status=400)
                self._note(current_exchange.get(), note)
            raise

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Cancels those that are in flight."""
        task = asyncio.current_task()
        reason = "stop" if task is not None and task is self.output_task else "disconnect"
        for request_id in request_ids:
            if self._end(request_id) is not None:
                self._send(Cancel(request_id=request_id, reason=reason))
                self.stories.close(request_id, "finished" if reason == "stop" else "cancelled", reason)

    def shutdown(self, timeout: float | None = None) -> None:
        """Does nothing: the link is closed by whoever entered it."""

    def dp_engines_running(self) -> bool:
        """Whether anything is in flight."""
        return bool(self._flights)

    async def is_sleeping_async(self) -> bool:
        """Never: workers come and go by themselves."""
        return False

    async def wake_up_async(self, tags: list[str] | None = None) -> bool:
        """Always awake."""
        return True

    async def is_scheduler_paused_async(self) -> bool:
        """Never."""
        return False

    async def reset_mm_cache_async(self) -> None:
        """Nothing to reset here: vLLM's renderer empties its own cache, and uploads are kept until they expire."""

    async def reset_encoder_cache_async(self) -> None:
        """Nothing to reset: embeddings are named by content."""

    async def reset_prefix_cache_async(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Nothing to reset here; says so."""
        return False

    async def _not_here(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError("this is done in each worker, not through the endpoint")

    # What `AsyncLLM` calls for RL and development and the base class lacks; HTTP 501.
    pause_scheduler_async = resume_scheduler_async = compute_weight_checksums_async = _not_here

    # --- the broker's side

    def on_message(self, message: Message, frames: list[bytes]) -> None:
        """Takes one message of the broker."""
        match message:
            case Tokens():
                self._on_output(message, not message.token_ids, frames)
            case Finished():
                if self._on_output(message, False, frames, is_last=True):
                    self._end(message.request_id)
                self.stories.close(message.request_id, "finished", message.finish_reason, message.story)
            case Failed():
                failure = Failure(
                    code=message.code,
                    message=message.message,
                    status=message.status if message.status in _ERROR_STATUSES else 500,
                    retry_after_s=message.retry_after_s,
                )
                if not self._sent_again(message):
                    self._fail(message.request_id, failure, message.story)
            case Uploaded():
                self.uploads.on_uploaded(message)
            case Status():
                self.status = message
                self.status_changed.set()
            case Story():
                self._stories_asked.answer(message.request_id, message)
            case CacheState():
                self._cache_asked.answer("", message)
            case _:
                log.warning("unexpected message from the broker", kind=type(message).__name__)

    async def on_registered(self, _welcome: Welcome) -> None:
        """The broker knows nothing of this incarnation yet: it gets the uploads that live."""
        self.uploads.send_all()

    async def on_lost(self, reason: str) -> None:
        """The registration has ended: nothing in flight can be finished."""
        self.status = None
        self.beliefs.clear()
        self.uploads.on_lost()
        self.fail_all(failure_of(ErrorCode.BROKER_LOST, f"the broker was lost: {reason}", 1.0))

    def fail_all(self, failure: Failure) -> None:
        """Ends all requests in flight by `failure`."""
        for request_id in list(self._flights):
            self._fail(request_id, failure)

    async def story(self, request_id: str) -> Story | None:
        """The broker's story of a request so far, or None where it does not answer in time."""
        return await self._stories_asked.ask(request_id, lambda: self._send(GetStory(request_id=request_id)))

    async def cache_state(self) -> CacheState | None:
        """How the pools are filled, or None where the broker does not answer in time."""
        return await self._cache_asked.ask("", lambda: self._send(GetCache()))

    # --- inside

    def _check(self, request: EngineCoreRequest) -> None:
        if self.draining:
            raise PipelineError(failure_of(ErrorCode.SHUTTING_DOWN, "this endpoint is shutting down", 1.0))
        if not self.link.registered:
            raise PipelineError(failure_of(ErrorCode.NOT_READY, "the broker cannot be reached", 1.0))
        check_request(request)

    async def _split(self, request: EngineCoreRequest) -> Split:
        """The request's patches."""
        if not request.mm_features:
            return Split([], [], [])
        salt = request.cache_salt or ""
        parts = self.splitter.quick(request.mm_features, salt)
        if parts is None:
            parts = await self.splitter.slow(request.mm_features, salt)
            # While that ran the client may have left or the broker may have been lost.
            self._check(request)
        return parts

    def _submit(self, request: EngineCoreRequest, parts: Split) -> None:
        assert self._processor is not None
        if not self._processor.has_request(request.request_id):
            raise PipelineError(failure_of(ErrorCode.ENGINE_FAILED, "a part of the request has failed"))
        deadline_s = self._config.endpoint.request_timeout_s
        sent = parts.without(self.beliefs)
        submit, frames = submission(request, sent, deadline_s)
        reason = too_large(frames)
        if reason:
            raise PipelineError(failure_of(ErrorCode.TOO_LARGE, reason))
        timer = asyncio.get_running_loop().call_later(
            deadline_s + _DEADLINE_GRACE_S, self._on_deadline, request.request_id
        )
        flight = Flight(request.request_id, wants_prompt_logprobs=wants_prompt_logprobs(request), timer=timer)
        flight.patches = [patch.patch_hash for patch in parts.patches]
        flight.whole = (request, parts) if sent is not parts else None
        self._flights[request.request_id] = flight
        self._exchanges[request.request_id] = current_exchange.get()
        self.stories.open(request.request_id, request.external_req_id or request.request_id)
        try:
            self.link.send(submit, frames)
        except LinkOverloadedError as error:
            self.stories.close(request.request_id, "failed", str(error))
            raise PipelineError(failure_of(ErrorCode.OVERLOADED, str(error), 1.0)) from None

    def _sent_again(self, message: Failed) -> bool:
        """Whether a failed request goes on: it lacked pixels that were believed to be there, and was sent with all."""
        flight = self._flights.get(message.request_id)
        if message.code != ErrorCode.PIXELS_NEEDED or flight is None:
            return False
        self.beliefs.forget(flight.patches)
        whole = flight.again()
        if whole is None:
            return False
        submit, frames = submission(*whole, max(flight.left_s(self._config.endpoint.request_timeout_s), 0.001))
        reason = too_large(frames)
        try:
            if not reason:
                self.link.send(submit, frames)
        except LinkOverloadedError as error:
            self._fail(message.request_id, failure_of(ErrorCode.OVERLOADED, str(error), 1.0))
        if reason:
            self._fail(message.request_id, failure_of(ErrorCode.TOO_LARGE, reason))
        return True

    def _on_output(
        self, message: Tokens | Finished, is_partial: bool, frames: list[bytes], is_last: bool = False
    ) -> bool:
        """Queues what an opaque output gives; false where the request is unknown or has failed by it."""
        request_id = message.request_id
        flight = self._flights.get(request_id)
        if flight is None:
            return False
        flight.num_cached_tokens = message.num_cached_tokens
        try:
            output = self._decoder.decode(frames)
            if is_last and not output.finished:
                raise IncompleteOutputError("the last output has no finish reason")
            if not is_partial and flight.patches and not flight.has_output:
                self.beliefs.add(flight.patches)
                flight.whole = None
            ready = flight.partial(output) if is_partial else flight.output(output)
        except Exception as error:
            if not isinstance(error, IncompleteOutputError):
                log.exception("an output could not be read", request_id=request_id)
            self._give_up(request_id, ErrorCode.ENGINE_FAILED, f"unreadable output: {error}")
            return False
        for each in ready:
            self._outputs.put_nowait(each)
        return True

    def _on_deadline(self, request_id: str) -> None:
        self._give_up(request_id, ErrorCode.DEADLINE, "the request took too long")

    def _give_up(self, request_id: str, code: ErrorCode, message: str) -> None:
        self._send(Cancel(request_id=request_id))
        self._fail(request_id, failure_of(code, message))

    def _fail(self, request_id: str, failure: Failure, story: list[StoryEvent] | None = None) -> None:
        """Ends a request and its siblings by `failure`: their caller gets it, nothing of them stays."""
        self.stories.close(request_id, "failed", f"{failure.code}: {failure.message}", story or ())
        exchange = self._exchanges.get(request_id)
        if self._end(request_id) is None:
            return
        assert self._processor is not None
        self._note(exchange, failure)
        state = self._processor.request_states.get(request_id)
        if state is not None:
            whole = state.parent_req.request_id if state.parent_req is not None else request_id
            for sibling in self._processor.abort_requests([whole], internal=True):
                if self._end(sibling) is not None:
                    self._send(Cancel(request_id=sibling))
                    self.stories.close(sibling, "cancelled", f"{request_id} failed")
            state.queue.put(PipelineError(failure))
        self._outputs.put_nowait(None)  # so that the gauges of vLLM's metrics follow

    def _end(self, request_id: str) -> Flight | None:
        """Takes a request out of flight; None where it is not in flight."""
        flight = self._flights.pop(request_id, None)
        self._exchanges.pop(request_id, None)
        if flight is not None and flight.timer is not None:
            flight.timer.cancel()
        return flight

    def _forget(self, request_id: str) -> None:
        """Removes what vLLM keeps of a request that was never submitted (it does so itself only for n > 1)."""
        self._end(request_id)
        if self._processor is not None and self._parent_of(request_id) is None:
            self._processor.abort_requests([request_id], internal=True)

    def _parent_of(self, request_id: str) -> str | None:
        assert self._processor is not None
        state = self._processor.request_states.get(request_id)
        return state.parent_req.request_id if state is not None and state.parent_req is not None else None

    def _send(self, message: Message, frames: Sequence[Any] = ()) -> bool:
        """Sends, unless too much waits already."""
        try:
            self.link.send(message, frames)
        except LinkOverloadedError:
            return False
        return True

    @staticmethod
    def _note(exchange: Any, failure: Failure) -> None:
        if exchange is not None and exchange.failure is None:
            exchange.failure = failure


def _split_bytes(config: VllmConfig) -> int:
    """How much of cut items is kept; their frames are mostly the memory of vLLM's processor cache."""
    multimodal = config.model_config.multimodal_config
    return max(_MIN_SPLIT_BYTES, int((multimodal.mm_processor_cache_gb if multimodal else 0) * (1 << 30)))

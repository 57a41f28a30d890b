"""The pipeline behind the broker as vLLM's engine core.

Lives in the endpoint process; owns the link to the broker. What is in flight is in `flights.py`. Written against vLLM
0.32 (`vllm.v1.engine.async_llm`, `core_client`): rendering, detokenizing, n > 1, stop strings and log-probabilities are
vLLM's own code, unchanged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import structlog
from vllm.config import VllmConfig
from vllm.exceptions import VLLMError
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.stats import SchedulerStats

from epd.config import Config
from epd.endpoint.engine.adapters import AdapterChecks
from epd.endpoint.engine.flights import Flights
from epd.endpoint.engine.questions import Questions
from epd.endpoint.engine.resume import SAMPLER_OPTIONS
from epd.endpoint.engine.stat_loggers import RequestTimes
from epd.endpoint.engine.submission import PipelineError, check_request
from epd.endpoint.http.exchange import current_exchange
from epd.endpoint.http.failures import failure_of
from epd.endpoint.media.uploads import Uploads
from epd.endpoint.ops.stories import Stories
from epd.errors import ErrorCode
from epd.messages import (
    CacheState,
    Failed,
    GetCache,
    GetStory,
    Kind,
    Message,
    Outputs,
    RequestOutput,
    Status,
    Story,
    Uploaded,
    Welcome,
    updated,
)
from epd.multimodal.recurrent import has_recurrent_state
from epd.multimodal.splitter import Split, Splitter
from epd.multimodal.units import agreed_units
from epd.process import resources
from epd.process.bounded import Beliefs
from epd.transport.link import BrokerLink, LinkOverloadedError

log = structlog.get_logger()

_MIN_SPLIT_BYTES = 64 << 20


class PipelineCore(AdapterChecks, EngineCoreClient):
    """What `AsyncLLM` takes to be its engine core: requests go to the broker, outputs come from it.

    Enter `link` (an async context manager) before the first request. Everything runs on one event loop.
    """

    engine_ranks_managed = (0,)

    def __init__(self, config: Config, vllm_config: VllmConfig, name: str) -> None:
        self._vllm_config = vllm_config
        self.splitter = Splitter(vllm_config, _split_bytes(vllm_config))
        self._recurrent = has_recurrent_state(vllm_config)
        self.beliefs = Beliefs()
        self.uploads = Uploads(config.endpoint, self.beliefs, self._send)
        self.stories = Stories(config.broker.story_keep)
        self.request_times = RequestTimes()
        # Custom logits processors may keep state that nobody can rebuild.
        prefill, decode = config.engine_options("prefill"), config.engine_options("decode")
        self.flights = Flights(
            config.endpoint,
            self._send,
            self.beliefs,
            self.stories,
            may_resume=not decode.get("logits_processors"),
            # If decode needs the state before a prompt's last token, prefill computes all but that token.
            prefill_samples=not self._recurrent and all(prefill.get(o) == decode.get(o) for o in SAMPLER_OPTIONS),
            names_prefixes=config.broker.prefill_choice == "affine",
        )
        self.status_changed = asyncio.Event()
        self._stories_asked: Questions[Story] = Questions()
        self._cache_asked: Questions[CacheState] = Questions()
        self.resources = SimpleNamespace(engine_dead=False)
        self.status: Status | None = None
        self.draining = False
        self.output_task: asyncio.Task[None] | None = None
        self.link = BrokerLink(
            config.broker.address,
            name,
            Kind.ENDPOINT,
            on_message=self.on_message,
            on_registered=self.on_registered,
            on_lost=self.on_lost,
            held=lambda: resources.of_process() | self.held(),
        )

    def attach(self, processor: OutputProcessor) -> None:
        """Sets the output processor whose requests these are; `PipelineLLM` calls it."""
        self.flights.processor = processor

    @property
    def num_in_flight(self) -> int:
        """How many requests were accepted and have not ended."""
        return len(self.flights)

    def held(self) -> dict[str, int]:
        """What is held for clients, by kind, here and in vLLM's output processor."""
        processor = self.flights.processor
        return {
            "requests": len(self.flights),
            "requests_waiting": self.flights.num_waiting,
            "request_bytes": self.flights.held_bytes,
            "outputs": self.flights.outputs.qsize(),
            "processor_requests": len(processor.request_states) + len(processor.parent_requests),
            "uploads": len(self.uploads),
            "upload_bytes": self.uploads.num_bytes,
        }

    # --- vLLM's side

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        """Generation only."""
        return ("generate",)

    async def get_output_async(self) -> EngineCoreOutputs:
        """Waits for output and returns everything that has come."""
        outputs = self.flights.outputs
        batch = [await outputs.get()]
        while not outputs.empty():
            batch.append(outputs.get_nowait())
        num_running = self.flights.num_running
        stats = SchedulerStats(num_running_reqs=num_running, num_waiting_reqs=len(self.flights) - num_running)
        return EngineCoreOutputs(outputs=[each for each in batch if each is not None], scheduler_stats=stats)

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Submits one request, or lets it wait for the broker.

        Raises:
            PipelineError: the pipeline cannot take it now; HTTP 503.
            VLLMValidationError: it asks for something that the pipeline does not do; HTTP 400.
        """
        if request.abort_immediately:
            return
        exchange = current_exchange.get()
        if exchange is not None:
            exchange.has_submitted = True
        try:
            self._check(request)
            parts = await self._split(request)
            if not self.flights.processor.has_request(request.request_id):
                raise PipelineError(failure_of(ErrorCode.ENGINE_FAILED, "another part of the request has failed"))
            self.flights.submit(request, parts, exchange)
        except BaseException as error:
            self._forget(request.request_id)
            if exchange is not None and isinstance(error, PipelineError):
                exchange.note(error.failure)
            elif exchange is not None and isinstance(error, VLLMError):
                exchange.note(failure_of(ErrorCode.INVALID_REQUEST, str(error)))
            raise

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Cancels those of the requests that are in flight."""
        task = asyncio.current_task()
        reason = "stop" if task is not None and task is self.output_task else "disconnect"
        for request_id in request_ids:
            self.flights.cancel(request_id, reason)

    def shutdown(self, timeout: float | None = None) -> None:
        """Does nothing: whoever entered the link closes it."""

    def dp_engines_running(self) -> bool:
        """Whether anything is in flight."""
        return bool(self.flights)

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

    # What `AsyncLLM` calls for RL and development but the base class lacks; HTTP 501.
    pause_scheduler_async = resume_scheduler_async = compute_weight_checksums_async = _not_here

    # --- the broker's side

    def on_message(self, message: Message, frames: list[bytes]) -> None:
        """Handles one message of the broker."""
        match message:
            case Outputs():
                at = 0
                for output in message.outputs:
                    end = at + output.num_frames
                    self._on_output(output, frames[at:end])
                    at = end
            case Failed():
                self.flights.on_failed(message)
            case Uploaded():
                self.uploads.on_uploaded(message)
            case Status():
                self.status = updated(self.status, message)
                # While the last encode worker is being replaced, what it left in the cache can still be read.
                units = agreed_units(self.status.workers)
                self.splitter.units = self.splitter.units if units is None else units
                self.status_changed.set()
            case Story():
                self._stories_asked.answer(message.request_id, message)
            case CacheState():
                self._cache_asked.answer("", message)
            case _:
                log.warning("unexpected message from the broker", kind=type(message).__name__)

    def _on_output(self, output: RequestOutput, frames: list[bytes]) -> None:
        """Handles outputs of requests' engines."""
        is_taken = self.flights.on_output(output, frames)
        if not output.finish_reason:
            return
        if is_taken:
            self.flights.end(output.request_id)
            self.stories.close(output.request_id, "finished", output.finish_reason, output.story)
            self.request_times.observe(output.story)
        else:
            self.stories.complete(output.request_id, output.story)

    async def on_registered(self, _welcome: Welcome) -> None:
        """Sends the broker, which knows nothing of this incarnation, all requests in flight and all live uploads."""
        self.flights.on_registered()
        self.uploads.send_all()

    async def on_lost(self, reason: str) -> None:
        """The registration has ended; everything that the broker knew is gone."""
        self.status = None
        self.beliefs.clear()
        self.uploads.on_lost()
        self.flights.on_lost(reason)

    def cancel(self, client_id: str, owner: str) -> int | None:
        """Cancels what is in flight of a client's request; returns how many, or None if there is none."""
        found = [each.request_id for each in self.stories.find(client_id, owner)]
        return self.flights.cancel_all(found) if found else None

    async def story(self, request_id: str) -> Story | None:
        """The broker's story of a request so far, or None if it does not answer in time."""
        if not self.link.registered:
            return None
        return await self._stories_asked.ask(request_id, lambda: self._send(GetStory(request_id=request_id)))

    async def cache_state(self) -> CacheState | None:
        """How the pools are filled, or None if the broker does not answer in time."""
        if not self.link.registered:
            return None
        return await self._cache_asked.ask("", lambda: self._send(GetCache()))

    # --- inside

    def _check(self, request: EngineCoreRequest) -> None:
        if self.draining:
            raise PipelineError(failure_of(ErrorCode.SHUTTING_DOWN, "this endpoint is shutting down"))
        self.flights.check_room()
        check_request(request, self._recurrent)

    async def _split(self, request: EngineCoreRequest) -> Split:
        """The request's patches."""
        if not request.mm_features:
            return Split([], [], [])
        salt = request.cache_salt or ""
        parts = self.splitter.quick(request.mm_features, salt)
        if parts is None:
            parts = await self.splitter.slow(request.mm_features, salt)
            # Meanwhile the client may have left or the broker may have been lost.
            self._check(request)
        return parts

    def _forget(self, request_id: str) -> None:
        """Removes what vLLM keeps of a request that was never submitted (vLLM itself does so only for n > 1)."""
        state = self.flights.processor.request_states.get(request_id)
        if state is None or state.parent_req is None:
            self.flights.processor.abort_requests([request_id], internal=True)

    def _send(self, message: Message, frames: Sequence[Any] = ()) -> bool:
        """Sends, unless too much is waiting already."""
        try:
            self.link.send(message, frames)
        except LinkOverloadedError:
            return False
        return True


def _split_bytes(config: VllmConfig) -> int:
    """How many bytes of cut items are kept; their frames mostly share memory with vLLM's processor cache."""
    multimodal = config.model_config.multimodal_config
    return max(_MIN_SPLIT_BYTES, int((multimodal.mm_processor_cache_gb if multimodal else 0) * (1 << 30)))

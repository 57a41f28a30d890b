"""One request between SUBMIT and its last output: makes what its workers send look like the output of one engine.

Lives in the endpoint process; pure. A part of the engine client, written against vLLM 0.32 (`vllm.v1.engine`).
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import torch
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, EngineCoreRequest
from vllm.v1.outputs import LogprobsTensors

from epd.endpoint.engine.resume import resumable
from epd.endpoint.engine.submission import wants_prompt_logprobs
from epd.endpoint.http.exchange import Part
from epd.multimodal.splitter import Split

_TOKEN_BYTES = 8


class IncompleteOutputError(RuntimeError):
    """A request has ended, but something that it asked for never came."""


class Flight:
    """A request that was accepted and has not ended.

    Args:
        request: vLLM's, without pixels.
        parts: its patches with all frames.
        exchange: its HTTP exchange, to note a failure.
        may_resume: whether requests may go on elsewhere at all.
        prefill_samples: whether prefill workers may sample first tokens at all.

    Attributes:
        request_id: vLLM's internal id, the pipeline's `request_id`.
        parts: as given; None once the frames were released, so that it cannot be sent again.
        patches: the hashes of its patches.
        num_bytes: roughly how much is held to send it again.
        token_ids: the output so far, as the workers gave it.
        begun: whether decode workers have given output since it was sent.
        has_output: whether any output was passed on.
        resumable: whether going on from prompt and tokens gives the same as an undisturbed run.
        prefill_samples: whether the prefill worker is to sample the first token, after which the decode worker goes on.
        sent: whether the current broker has it.
        attempts: how often it was sent.
        num_restarts: how often the same broker needed it again.
        unread_bytes: output that its client has not read.
        timers: fail it at its deadline, or if no broker comes; cancelled when it ends.
        part: how far it has come, for its exchange.
    """

    def __init__(
        self,
        request: EngineCoreRequest,
        parts: Split,
        *,
        exchange: Any = None,
        may_resume: bool = True,
        prefill_samples: bool = True,
    ) -> None:
        assert request.sampling_params is not None and request.prompt_token_ids is not None
        self.request, self.exchange = request, exchange
        self.request_id: str = request.request_id
        self.parts: Split | None = parts
        self.patches = [patch.patch_hash for patch in parts.patches]
        num_prompt_tokens = len(request.prompt_token_ids)
        self.num_bytes = sum(map(len, parts.frames)) + num_prompt_tokens * _TOKEN_BYTES
        self.resumable = may_resume and resumable(request.sampling_params)
        # Log-probabilities of the prompt come in a separate output.
        self.prefill_samples = prefill_samples and self.resumable and not wants_prompt_logprobs(request)
        self.part = Part(
            request_id=self.request_id,
            client_id=request.external_req_id or self.request_id,
            num_prompt_tokens=num_prompt_tokens,
            num_patches=len(self.patches),
        )
        self.token_ids: list[int] = []
        self.has_output = self.begun = self.sent = False
        self.attempts = self.num_restarts = self.unread_bytes = 0
        self.timers: dict[str, asyncio.TimerHandle] = {}
        self._submitted_at = time.monotonic()
        self._num_rows = num_prompt_tokens - 1
        self._waits = wants_prompt_logprobs(request)
        self._parts: list[LogprobsTensors] = []
        self._row_logprobs: Any = None
        self._held: list[EngineCoreOutput] = []

    def start_over(self) -> bool:
        """Makes it ready to be sent again; false if that is not possible.

        Output that was passed on stays; the rest is forgotten, and will come again.
        """
        if self.parts is None or (self.has_output and not self.resumable):
            return False
        self.sent = False
        if not self.has_output:
            self.token_ids, self._parts, self._row_logprobs, self._held = [], [], None, []
        return True

    def stop_timer(self, name: str) -> None:
        """Cancels a timer, if it runs."""
        timer = self.timers.pop(name, None)
        if timer is not None:
            timer.cancel()

    def left_s(self, deadline_s: float) -> float:
        """How many seconds of a deadline are left."""
        return deadline_s - (time.monotonic() - self._submitted_at)

    def partial(self, output: EngineCoreOutput) -> list[EngineCoreOutput]:
        """Takes an output of the prefill worker without tokens; returns what can be processed now."""
        if self.has_output:
            return []  # the prompt was computed again, to go on
        if output.new_prompt_logprobs_tensors is not None:
            self._parts.append(output.new_prompt_logprobs_tensors)
        if output.prompt_token_id_logprobs is not None:
            self._row_logprobs = output.prompt_token_id_logprobs
        return self._release(self._held) if self._held else []

    def output(self, output: EngineCoreOutput) -> list[EngineCoreOutput]:
        """Takes an output of the decode worker; returns what can be processed now.

        Raises:
            IncompleteOutputError: it is the last one, but prompt log-probabilities are still missing.
        """
        output.request_id = self.request_id
        output.new_prompt_logprobs_tensors = None  # belongs to the one token that decode computes again, if any
        self.token_ids += output.new_token_ids
        self.part.num_output_tokens = len(self.token_ids)
        if self._waits and not self._parts and self._row_logprobs is None:
            if output.finished:
                raise IncompleteOutputError("the prompt's log-probabilities did not arrive")
            self._held.append(output)
            return []
        return self._release([*self._held, output])

    def _release(self, outputs: list[EngineCoreOutput]) -> list[EngineCoreOutput]:
        self._held, self._waits = [], False
        for output in outputs:
            # Event times are from the worker's clock, which another host does not share; vLLM's metrics compare them
            # with ours. Here a request is queued and running from its submission on, wherever it goes on later.
            preempted = [event for event in output.events or () if event.type == EngineCoreEventType.PREEMPTED]
            output.events = preempted or None
        if not self.has_output:
            self.has_output, self.part.first_at = True, time.monotonic()
            first = outputs[0]
            first.events = [
                EngineCoreEvent(type=kind, timestamp=self._submitted_at)
                for kind in (EngineCoreEventType.QUEUED, EngineCoreEventType.SCHEDULED)
            ]
            if first.prefill_stats is not None:
                # As one engine would say: a decode worker counts the KV that was pushed to it, which was just computed
                # for it.
                local = first.prefill_stats.num_local_cached_tokens
                cached = local if self.part.num_cached_tokens < 0 else self.part.num_cached_tokens
                num_tokens = self._num_rows + 1
                first.prefill_stats.set(num_tokens, min(cached, num_tokens), num_external_cached_tokens=0)
            if self._parts:
                first.new_prompt_logprobs_tensors = _joined(self._parts, self._num_rows)
            if self._row_logprobs is not None:
                first.prompt_token_id_logprobs = self._row_logprobs
        return outputs


def _joined(parts: list[LogprobsTensors], num_rows: int) -> LogprobsTensors:
    """Several chunks of prompt log-probabilities as one, in order of arrival.

    A prompt that was computed twice, or with output tokens behind it, gives more rows than it has tokens.
    """
    return LogprobsTensors(
        torch.cat([part.logprob_token_ids for part in parts])[:num_rows],
        torch.cat([part.logprobs for part in parts])[:num_rows],
        torch.cat([part.selected_token_ranks for part in parts])[:num_rows],
    )

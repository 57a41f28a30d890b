"""One request between SUBMIT and its last output: what its workers send, put back into the shape of one engine.

Lives in the endpoint process; pure. A part of the engine client, written against vLLM 0.32 (`vllm.v1.engine`).
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import torch
from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType, EngineCoreOutput, EngineCoreRequest
from vllm.v1.outputs import LogprobsTensors

from epd.multimodal.splitter import Split


class IncompleteOutputError(RuntimeError):
    """A request has ended and something it asked for never came."""


class Flight:
    """A request that has been submitted.

    Args:
        request_id: vLLM's internal id, the pipeline's `request_id`.
        wants_prompt_logprobs: the prefill worker will send prompt log-probabilities; all output waits for them, as
            vLLM's handlers expect them with the first output.
        timer: fails the request at its deadline; cancelled when it ends.

    Attributes:
        patches: the hashes of its patches.
        whole: the engine request and its patches with all frames, while it may have to be sent again.
        num_cached_tokens: of the prompt, that the prefill worker had computed before; -1 while nobody has said so.
    """

    def __init__(
        self, request_id: str, *, wants_prompt_logprobs: bool, timer: asyncio.TimerHandle | None = None
    ) -> None:
        self.request_id = request_id
        self.timer = timer
        self.has_output = False
        self.patches: list[str] = []
        self.whole: tuple[EngineCoreRequest, Split] | None = None
        self.num_cached_tokens = -1
        self._wants_prompt_logprobs = wants_prompt_logprobs
        self._submitted_at = time.monotonic()
        self._waits = wants_prompt_logprobs
        self._parts: list[LogprobsTensors] = []
        self._row_logprobs: Any = None
        self._held: list[EngineCoreOutput] = []

    def again(self) -> tuple[EngineCoreRequest, Split] | None:
        """Starts over: what is to be sent again, once; None where that is not possible."""
        whole, self.whole = self.whole, None
        if whole is not None:
            self._waits, self._parts, self._row_logprobs, self._held = self._wants_prompt_logprobs, [], None, []
        return whole

    def left_s(self, deadline_s: float) -> float:
        """How much of a deadline is left."""
        return deadline_s - (time.monotonic() - self._submitted_at)

    def partial(self, output: EngineCoreOutput) -> list[EngineCoreOutput]:
        """An output of the prefill worker that has no tokens; returns what can be processed now."""
        if output.new_prompt_logprobs_tensors is not None:
            self._parts.append(output.new_prompt_logprobs_tensors)
        if output.prompt_token_id_logprobs is not None:
            self._row_logprobs = output.prompt_token_id_logprobs
        return self._release(self._held) if self._held else []

    def output(self, output: EngineCoreOutput) -> list[EngineCoreOutput]:
        """An output of the decode worker; returns what can be processed now.

        Raises:
            IncompleteOutputError: it is the last one, and prompt log-probabilities are still missing.
        """
        output.request_id = self.request_id
        output.new_prompt_logprobs_tensors = None  # of the one token that decode computes again, if any
        if self._waits and not self._parts and self._row_logprobs is None:
            if output.finished:
                raise IncompleteOutputError("the prompt's log-probabilities did not arrive")
            self._held.append(output)
            return []
        return self._release([*self._held, output])

    def _release(self, outputs: list[EngineCoreOutput]) -> list[EngineCoreOutput]:
        self._held, self._waits = [], False
        if not self.has_output:
            self.has_output = True
            first = outputs[0]
            # Event times are of the worker's clock, which another host does not share; vLLM's metrics compare them
            # with ours. Here a request is queued and running from its submission on.
            first.events = [
                EngineCoreEvent(type=kind, timestamp=self._submitted_at)
                for kind in (EngineCoreEventType.QUEUED, EngineCoreEventType.SCHEDULED)
            ]
            if first.prefill_stats is not None:
                # The decode worker counts all KV that it did not compute, that which was just computed for it too.
                local = first.prefill_stats.num_local_cached_tokens
                first.prefill_stats.num_cached_tokens = local if self.num_cached_tokens < 0 else self.num_cached_tokens
            if self._parts:
                first.new_prompt_logprobs_tensors = _joined(self._parts)
            if self._row_logprobs is not None:
                first.prompt_token_id_logprobs = self._row_logprobs
        for output in outputs[1:]:
            output.events = None
        return outputs


def _joined(parts: list[LogprobsTensors]) -> LogprobsTensors:
    """Several chunks of prompt log-probabilities as one, in the order they came."""
    if len(parts) == 1:
        return parts[0]
    return LogprobsTensors(
        torch.cat([part.logprob_token_ids for part in parts]),
        torch.cat([part.logprobs for part in parts]),
        torch.cat([part.selected_token_ranks for part in parts]),
    )

"""Decode requests whose first token the prefill worker samples: they wait for that token and go on after it.

Lives in a decode worker's engine thread; a part of `workers.engine`, written against vLLM 0.32
(`vllm.v1.core.sched.scheduler`, `vllm.v1.request`).

Such a request is registered for the KV of its prompt like any other. KV and token come by different routes. When both
are there, and before the scheduler gives the request to a model runner, the token becomes the last one of its prompt:
the next step computes it and samples the one after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request


class Handover:
    """The requests of `scheduler` that wait, by id, with their tokens once those are known."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._awaited: dict[str, Sequence[int] | None] = {}
        self._arrived: set[str] = set()

    def __len__(self) -> int:
        return len(self._awaited)

    def expect(self, request_id: str) -> None:
        """Keeps a request that was just added from sampling before `give`."""
        self._awaited[request_id] = None

    def give(self, request_id: str, token_ids: Sequence[int]) -> bool:
        """Gives a request what the prefill worker has sampled; nothing if this engine is to sample after all.

        Returns whether it was awaited.
        """
        if self._awaited.get(request_id, ()) is not None:
            return False
        self._awaited[request_id] = token_ids
        self._show(request_id)
        return True

    def forget(self, request_ids: Iterable[str]) -> None:
        """Forgets requests that are about to be aborted."""
        for request_id in request_ids:
            self._awaited.pop(request_id, None)
            self._show(request_id)

    def lacking(self) -> frozenset[str]:
        """The requests whose KV has come, but whose token has not."""
        return frozenset(self._arrived)

    def match(self) -> None:
        """Before a step: hides arrived KV from the scheduler until its token has come, too."""
        arrived = self._scheduler.finished_recving_kv_req_ids
        for request_id in list(self._awaited):
            request = self._scheduler.requests.get(request_id)
            if request is None:  # it has failed
                del self._awaited[request_id]
                self._arrived.discard(request_id)
            elif request_id in arrived:
                token_ids = self._awaited[request_id]
                if token_ids is None:
                    arrived.discard(request_id)
                    self._arrived.add(request_id)
                else:
                    del self._awaited[request_id]
                    extend_prompt(request, token_ids)

    def _show(self, request_id: str) -> None:
        if request_id in self._arrived:
            self._arrived.discard(request_id)
            self._scheduler.finished_recving_kv_req_ids.add(request_id)


def extend_prompt(request: Request, token_ids: Sequence[int]) -> None:
    """Adds tokens to the prompt of a request that no model runner has seen; they count towards the output's limits."""
    params = request.sampling_params
    assert params is not None and request.prompt_token_ids is not None and not request.output_token_ids
    request.prompt_token_ids = [*request.prompt_token_ids, *token_ids]
    request._all_token_ids.extend(token_ids)
    request.num_prompt_tokens += len(token_ids)
    request.update_block_hashes()
    request.max_tokens -= len(token_ids)
    params.max_tokens = request.max_tokens
    params.min_tokens = max(0, params.min_tokens - len(token_ids))

"""vLLM's NIXL push connector (0.32), extended: pushes can be called off, by either side and at any moment.

Lives in prefill and decode workers; vLLM makes one instance beside the scheduler and one beside each model runner.
vLLM's own connector keeps the blocks of a decode request that is aborted while it waits for its KV until the KV comes,
since the prefill worker may be writing to them. If it never comes (aborted there too, dead, failed), they are kept for
ever. And a prefill worker keeps the blocks of a finished request until its lease ends, even if nobody wants them.
Here (ADR 11):

- A decode worker that gives up a request *asks*: it sends its registration again, marked `called_off`.
- A prefill worker answers a registration that it will not write for: REFUSED, from the thread that starts all writes,
  so a refusal means that no write has been or will be started. It then frees the request's blocks at once.
- REFUSED fails the receive: blocks of an aborted request are free, a request that still waits ends with an error.
- Without an answer, the decode worker asks again and checks whether the prefill engine still exists; it does not if its
  side channel refuses or speaks for another engine. What does not exist does not write.
- Registrations match by their whole id; vLLM takes ids that differ only in their last eight digits for the same. No id
  is used for a second push: each attempt at a request has its own.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.utils import BlockIds
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorRole
from vllm.distributed.kv_transfer.kv_connector.v1.nixl import connector, push_scheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import KVConnectorOutput
from vllm.v1.request import Request, RequestStatus

from workers.push_worker import PushWorker

MODULE = __name__
CONNECTOR = "NixlPushConnector"  # vLLM recognises by this name what the connector can do
# How long a prefill worker keeps KV for a decode worker that does not show up; the broker's ABORT comes earlier.
LEASE_S = 15


class PushScheduler(push_scheduler.NixlPushConnectorScheduler):
    """Notices which requests end without their KV having been moved, and tells the workers beside the models."""

    def __init__(self, vllm_config: VllmConfig, engine_id: str, kv_cache_config: KVCacheConfig) -> None:
        super().__init__(vllm_config, engine_id, kv_cache_config)
        self._awaited: dict[str, dict[str, Any]] = {}
        self._called_off: dict[str, dict[str, Any]] = {}
        self._given_up: dict[str, None] = {}

    def give_up(self, request_ids: Iterable[str]) -> None:
        """Prefill: nobody wants the KV of these requests any more, whether they are finished, running or unknown."""
        if self.vllm_config.kv_transfer_config.kv_role == "kv_producer":
            self._given_up.update(dict.fromkeys(request_ids))

    @property
    def num_held(self) -> int:
        """How many requests something is remembered for between two steps; 0 when idle."""
        tables = (self._awaited, self._called_off, self._given_up, self._finished_request_blocks, self._reqs_need_recv)
        return sum(map(len, tables)) + len(self._push_pending_registrations) + len(self._heartbeat_req_engine)

    def update_state_after_alloc(self, request: Request, blocks: Any, num_external_tokens: int) -> None:
        """Remembers what a decode request is registered with."""
        super().update_state_after_alloc(request, blocks, num_external_tokens)
        if registration := self._push_pending_registrations.get(request.request_id):
            self._awaited[request.request_id] = registration

    def request_finished(self, request: Request, block_ids: BlockIds) -> tuple[bool, dict[str, Any] | None]:
        """Calls off the push that a decode request waits for; gives up an unfinished prefill request."""
        params = request.kv_transfer_params or {}
        unscheduled = bool(params.get("do_remote_prefill"))
        result: tuple[bool, dict[str, Any] | None] = super().request_finished(request, block_ids)
        if unscheduled:
            # vLLM announces an empty receive, which the workers would keep for ever: no registration is sent.
            self._reqs_need_recv.pop(request.request_id, None)
        elif registration := self._awaited.pop(request.request_id, None):
            self._called_off[request.request_id] = registration
        elif params.get("do_remote_decode") and request.status is RequestStatus.FINISHED_ABORTED:
            self._given_up[request.request_id] = None
        return result

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """Forgets what has arrived."""
        super().update_connector_output(connector_output)
        for request_id in connector_output.finished_recving or ():
            self._awaited.pop(request_id, None)

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """Adds what was called off and given up to this step's metadata."""
        meta = super().build_connector_meta(scheduler_output)
        meta.called_off, self._called_off = self._called_off, {}
        meta.given_up, self._given_up = list(self._given_up), {}
        return meta

    def has_pending_push_work(self) -> bool:
        """Whether a step is needed."""
        return bool(self._called_off or self._given_up) or super().has_pending_push_work()


class NixlPushConnector(connector.NixlPushConnector):
    """vLLM's connector with the two halves above."""

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig) -> None:
        # Not vLLM's own constructor: it would make vLLM's halves, which open ports and agents.
        connector.NixlBaseConnector.__init__(self, vllm_config, role, kv_cache_config)
        if vllm_config.parallel_config.decode_context_parallel_size > 1:
            raise ValueError("NixlPushConnector does not support decode_context_parallel_size > 1.")
        self.connector_scheduler = None
        self.connector_worker = None
        if role is KVConnectorRole.SCHEDULER:
            self.connector_scheduler = PushScheduler(vllm_config, self.engine_id, kv_cache_config)
        else:
            self.connector_worker = PushWorker(vllm_config, self.engine_id, kv_cache_config)

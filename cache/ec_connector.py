"""vLLM's encoder-cache connector over the shared pools; the only module of `cache` that touches vLLM (0.32).

Lives in encode, prefill and decode workers. vLLM makes one instance beside the scheduler, which knows which patch is in
which slot, and one beside each model runner, which copies embeddings out of and into vLLM's encoder cache. What the
first decides in a step travels to the others as connector metadata, so it also works if they are in different
processes.

Encode workers write: the item's identifier is the id of the encode job, the slot is known before the job is scheduled,
and the job is done once its model runner says that it has been written. Prefill and decode workers read: a patch counts
as available only after its slot was read and verified here, beside the scheduler; a slot that holds anything else is
reported stale and never reaches the model. Slots of another host are fetched and stored while the engine goes on. An
item there may consist of several patches, which its identifier names (`epd.multimodal.item_identifiers`): it is
available when they all are, and its embeddings are theirs, one after the other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any, cast

import torch
from vllm.config import VllmConfig
from vllm.distributed.ec_transfer import get_ec_transfer
from vllm.distributed.ec_transfer.ec_connector.base import (
    ECConnectorBase,
    ECConnectorMetadata,
    ECConnectorRole,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from cache.pools import DEVICE_KINDS, DevicePoolView, PoolError
from cache.pools.remote import RemoteView
from cache.slot import StaleSlotError
from cache.tensors import PoolTable, as_tensor, read_tensor, write_tensor
from epd.messages import Pool, Slot
from epd.multimodal.item_identifiers import patches_of

CONNECTOR = "PatchCacheConnector"
MODULE = __name__


@dataclasses.dataclass
class StepPlan(ECConnectorMetadata):
    """What the model runner does in one step: slots to write by job id, and slots to read by item identifier.

    The slots of an item are those of the patches that its identifier names, in order. `fetched` has the embeddings that
    came from another host, by patch, for model runners in other processes.
    """

    writes: dict[str, Slot]
    reads: dict[str, list[Slot]]
    fetched: dict[str, torch.Tensor]
    pools: list[Pool]
    owner: str


@dataclasses.dataclass
class Written:
    """What a model runner has written since it was last asked: jobs that are in their slots, and why others are not.

    Jobs that are `storing` are on their way to a slot on another host; `unstored` ones are done, but their pool could
    not be reached, which is not their fault. `num_unsettled` copies on a device are not known to have run.
    """

    done: set[str] = dataclasses.field(default_factory=set)
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    unstored: dict[str, str] = dataclasses.field(default_factory=dict)
    storing: set[str] = dataclasses.field(default_factory=set)
    num_unsettled: int = 0


def take_written(worker: Any) -> Written:
    """Runs beside a model runner (`collective_rpc`): its report.

    vLLM 0.32 drops the connector's own report to the scheduler on the encode-only path, so it is fetched.
    """
    connector = get_ec_transfer()
    assert isinstance(connector, PatchCacheConnector)
    return connector.take_report()


# Embeddings that were verified beside the scheduler, for a model runner in the same process (the "uni" executor).
_verified: dict[str, torch.Tensor] = {}


class PatchCacheConnector(ECConnectorBase):
    """The connector. The engine thread calls the methods of the first block; vLLM calls the others.

    `ec_connector_extra_config`: `min_overlap_tokens` is the shortest run of ready tokens that is worth a prefill step
    while later patches of the request are still being encoded; `owner` is written into slot headers.
    """

    def __init__(self, vllm_config: VllmConfig, role: ECConnectorRole) -> None:
        super().__init__(vllm_config, role)
        extra = vllm_config.ec_transfer_config.ec_connector_extra_config
        self._min_overlap_tokens = int(extra.get("min_overlap_tokens", 0))
        self._owner = str(extra.get("owner", ""))
        self._pools = PoolTable()
        # Beside the scheduler:
        self._write_slots: dict[str, Slot] = {}
        self._read_slots: dict[str, Slot] = {}
        self._fetching: dict[str, Slot] = {}
        self._unwritten: dict[str, Slot] = {}
        self._readers: dict[str, set[str]] = {}
        self._wants: dict[str, set[str]] = {}
        self._needed: dict[str, list[str]] = {}
        self._plan_writes: dict[str, Slot] = {}
        self._plan_reads: dict[str, list[Slot]] = {}
        self._fetched: dict[str, torch.Tensor] = {}
        # Beside the model runner:
        self._report = Written()
        self._stores: dict[str, Future[None]] = {}

    # ---- called by the engine thread, beside the scheduler ---------------------------------------------------------

    def set_pools(self, pools: Iterable[Pool]) -> list[str]:
        """The pools that slots may be in from now on; returns why some cannot be opened."""
        return self._pools.update(pools)

    def set_write_slot(self, job: str, slot: Slot) -> None:
        """The slot that an encode job goes to."""
        self._write_slots[job] = slot

    def expect(self, request_id: str, patch_hashes: Iterable[str]) -> None:
        """A request will read these patches; they are kept for it once they are there."""
        for patch_hash in patch_hashes:
            self._wants.setdefault(request_id, set()).add(patch_hash)
            self._readers.setdefault(patch_hash, set()).add(request_id)

    def patch_ready(self, patch_hash: str, slot: Slot) -> Future[memoryview] | None:
        """Reads and verifies a slot; its patch is available from now on, or once `look_at_unwritten` finds it written.

        Returns:
            None; for a slot on another host a future of the fetch, after which `patch_fetched` is to be called.

        Raises:
            StaleSlotError: the slot holds something else.
        """
        if patch_hash in self._read_slots or patch_hash not in self._readers:
            return None
        view = self._pools.view(slot)
        if isinstance(view, RemoteView):
            if self._fetching.get(patch_hash) == slot:
                return None
            self._fetching[patch_hash] = slot
            return view.fetch(slot)
        if view.pool.kind in DEVICE_KINDS:  # it is read beside the model runner
            self._unwritten.pop(patch_hash, None)
            if not cast(DevicePoolView, view).check(slot):
                self._unwritten[patch_hash] = slot
                return None
        else:
            _verified[patch_hash] = read_tensor(self._pools, slot)
        self._read_slots[patch_hash] = slot
        return None

    @property
    def num_unwritten(self) -> int:
        """How many patches on a device were announced by their writer, but their copy has not run yet."""
        return len(self._unwritten)

    def look_at_unwritten(self) -> list[tuple[str, Slot, str]]:
        """Makes available what has been written by now; returns the patches that never will be, with the reason."""
        stale = []
        waiting, self._unwritten = self._unwritten, {}
        for patch_hash, slot in waiting.items():
            try:
                self.patch_ready(patch_hash, slot)
            except StaleSlotError as error:
                stale.append((patch_hash, slot, str(error)))
        return stale

    def patch_fetched(self, patch_hash: str, slot: Slot, fetch: Future[memoryview]) -> None:
        """A fetch that `patch_ready` began is done; from now on its patch is available, if it is still wanted.

        Raises:
            StaleSlotError: the slot holds something else, although its patch is still wanted from there.
        """
        if self._fetching.get(patch_hash) != slot:
            return  # by now it is read from another slot
        del self._fetching[patch_hash]
        if patch_hash in self._read_slots or patch_hash not in self._readers:
            return
        _verified[patch_hash] = as_tensor(fetch.result(), slot)
        if self._vllm_config.parallel_config.world_size > 1:
            self._fetched[patch_hash] = _verified[patch_hash]
        self._read_slots[patch_hash] = slot

    def readers(self, patch_hash: str) -> list[str]:
        """The requests that will read a patch."""
        return sorted(self._readers.get(patch_hash, ()))

    def forget(self, request_id: str) -> None:
        """A request no longer reads patches."""
        self._needed.pop(request_id, None)
        for patch_hash in self._wants.pop(request_id, ()):
            readers = self._readers[patch_hash]
            readers.discard(request_id)
            if not readers:
                del self._readers[patch_hash]
                self._read_slots.pop(patch_hash, None)
                self._fetched.pop(patch_hash, None)
                self._unwritten.pop(patch_hash, None)
                _verified.pop(patch_hash, None)

    def forget_job(self, job: str) -> None:
        """An encode job has ended, one way or the other."""
        self._write_slots.pop(job, None)

    def take_needed(self) -> dict[str, list[str]]:
        """Requests that cannot be scheduled because nobody has announced their patches, and those patches."""
        needed = {
            request_id: missing
            for request_id, hashes in self._needed.items()
            if (missing := [h for h in hashes if h not in self._wants.get(request_id, ())])
        }
        self._needed.clear()
        return needed

    @property
    def num_held(self) -> int:
        """How many patches are held or being fetched for requests, plus the write slots of unfinished jobs."""
        return sum(map(len, (self._read_slots, self._fetching, self._unwritten, self._write_slots)))

    # ---- called by vLLM beside the scheduler -----------------------------------------------------------------------

    def has_cache_item(self, identifier: str) -> bool:
        """Whether an item's patches can all be loaded from their slots."""
        return all(patch_hash in self._read_slots for patch_hash in patches_of(identifier))

    def ensure_cache_available(self, request: Request, num_computed_tokens: int) -> bool:
        """Whether enough of what comes after `num_computed_tokens` is ready to be worth a step."""
        if not self.is_consumer:
            return True
        ready_until, missing = request.num_tokens, []
        for feature in request.mm_features:
            position = feature.mm_position
            if position.offset + position.length <= num_computed_tokens:
                continue
            lacking = [one for one in patches_of(feature.identifier) if one not in self._read_slots]
            if lacking:
                missing += lacking
                ready_until = min(ready_until, position.offset)
        if not missing:
            return True
        self._needed[request.request_id] = list(dict.fromkeys(missing))
        run = ready_until - num_computed_tokens
        return self._min_overlap_tokens > 0 and run >= self._min_overlap_tokens

    def update_state_after_alloc(self, request: Request, index: int) -> None:
        """Plans the write of an item that will be encoded, or the read of one that will be loaded."""
        identifier = request.mm_features[index].identifier
        if self.is_producer and identifier in self._write_slots:
            self._plan_writes[identifier] = self._write_slots[identifier]
        elif self.has_cache_item(identifier):
            self._plan_reads[identifier] = [self._read_slots[one] for one in patches_of(identifier)]

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> StepPlan:
        """Hands this step's plan to the model runner."""
        fetched = {
            patch_hash: self._fetched[patch_hash]
            for identifier in (self._plan_reads if self._fetched else ())
            for patch_hash in patches_of(identifier)
            if patch_hash in self._fetched
        }
        plan = StepPlan(self._plan_writes, self._plan_reads, fetched, self._pools.pools, self._owner)
        self._plan_writes, self._plan_reads = {}, {}
        return plan

    def shutdown(self) -> None:
        """Closes the pools."""
        self._pools.close()

    # ---- called by vLLM beside the model runner --------------------------------------------------------------------

    def start_load_caches(self, encoder_cache: dict[str, torch.Tensor], **kwargs: Any) -> None:
        """Puts this step's embeddings into vLLM's encoder cache."""
        plan = self._get_connector_metadata()
        assert isinstance(plan, StepPlan)
        device = self._vllm_config.device_config.device
        for identifier, slots in plan.reads.items():
            if identifier in encoder_cache:
                continue
            parts = []
            for patch_hash, slot in zip(patches_of(identifier), slots, strict=True):
                embeddings = plan.fetched.get(patch_hash, _verified.get(patch_hash))
                if embeddings is None:
                    self._pools.update(plan.pools)
                    embeddings = read_tensor(self._pools, slot)
                parts.append(embeddings.to(device, non_blocking=True))
            encoder_cache[identifier] = parts[0] if len(parts) == 1 else torch.cat(parts)

    def save_caches(self, encoder_cache: dict[str, torch.Tensor], mm_hash: str, **kwargs: Any) -> None:
        """Writes one encoded item into its slot."""
        plan = self._get_connector_metadata()
        assert isinstance(plan, StepPlan)
        slot = plan.writes.get(mm_hash)
        if slot is None or get_tensor_model_parallel_rank() != 0:
            return
        try:
            embeddings = encoder_cache[mm_hash]
            found = (embeddings.shape[0], embeddings.shape[-1], str(embeddings.dtype).removeprefix("torch."))
            if found != (slot.num_tokens, slot.width, slot.dtype):
                raise ValueError(f"the encoder gave {found}, the slot is for {slot.num_tokens, slot.width, slot.dtype}")
            self._pools.update(plan.pools)
            store = write_tensor(self._pools, slot, embeddings, plan.owner)
            if store is None:
                self._report.done.add(mm_hash)
            else:
                self._stores[mm_hash] = store
        except (PoolError, ValueError, StaleSlotError) as error:
            self._report.failed[mm_hash] = str(error)

    def not_encoded(self, job: str, reason: str) -> None:
        """An item could not be encoded, so there is nothing to write."""
        self._report.failed[job] = reason

    def take_report(self) -> Written:
        """What was written since the last call."""
        self._report.num_unsettled = self._pools.settle()
        for name in [name for name, store in self._stores.items() if store.done()]:
            if (error := self._stores.pop(name).exception()) is None:
                self._report.done.add(name)
            else:
                # "Gone" happens when a cache was restarted and the broker does not know yet.
                is_away = isinstance(error, PoolError | StaleSlotError)
                (self._report.unstored if is_away else self._report.failed)[name] = str(error)
        report, self._report = self._report, Written()
        report.storing = set(self._stores)
        return report

"""A stage's vLLM engine (0.32): how it is built, fed and stepped.

Lives in a worker process; everything here is called from its engine thread. An encode engine holds no language model, a
prefill or decode engine no vision tower; embeddings go through `cache.ec_connector`, KV through vLLM's
`NixlPushConnector`.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterable, Sequence

from vllm.multimodal.inputs import MultiModalFeatureSpec, MultiModalKwargsItem, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request
from vllm.v1.serial_utils import MsgpackDecoder

from cache import ec_connector
from cache.ec_connector import PatchCacheConnector, Written
from epd.config import Config
from epd.messages import EncodeJob, KvPeer, Stage, WorkerInfo
from epd.multimodal.item_identifiers import patches_of
from epd.multimodal.positions import positions_for
from workers import options, parameters, quiet_threads
from workers.adapters import Adapters
from workers.amx import permit_amx
from workers.gauges import Gauges
from workers.handover import Handover
from workers.isolation import isolate_items
from workers.outputs import OutputPacker

# Frames arrive as bytes; vLLM reads tensors from them and never writes to them.
warnings.filterwarnings("ignore", message="The given buffer is not writable")

_ENDLESS = 1 << 40


class ReadyPatchCache(EncoderCacheManager):
    """Replaces vLLM's accounting of its encoder cache: patches that are ready decide, and nothing is kept for later.

    vLLM prefills up to the first item that cannot be allocated: here, the first one whose embeddings have not arrived.
    There is no budget, since the embeddings exist already, in a pool of bounded size. An item is forgotten as soon as
    no request uses it, so that vLLM never holds a view of a released slot.
    """

    def __init__(self, connector: PatchCacheConnector, gated: bool) -> None:
        super().__init__(cache_size=_ENDLESS)
        self._connector, self._gated = connector, gated

    def can_allocate(
        self, request: Request, input_id: int, encoder_compute_budget: int, num_embeds_to_schedule: int
    ) -> bool:
        """Whether the item may be scheduled: encode engines keep vLLM's compute budget, readers wait for the slot."""
        if self._gated:
            return self._connector.has_cache_item(request.mm_features[input_id].identifier)
        return bool(request.get_num_encoder_embeds(input_id) <= encoder_compute_budget)

    def free_encoder_input(self, request: Request, input_id: int) -> None:
        """Drops the request's reference; the item goes with the last one."""
        super().free_encoder_input(request, input_id)
        patch_hash = request.mm_features[input_id].identifier
        if patch_hash in self.freeable:
            self.num_free_slots += self.freeable.pop(patch_hash)
            del self.cached[patch_hash]
            del self.num_embeds_by_hash[patch_hash]
            self.freed.append(patch_hash)


class Engine:
    """One stage's `EngineCore`, in the thread that constructs it.

    Args:
        config: the pipeline's configuration.
        stage: encode, prefill or decode.
        name: this worker's name.
    """

    def __init__(self, config: Config, stage: Stage, name: str) -> None:
        started = time.monotonic()
        self.stage = stage
        quiet_threads.share_process_group()
        permit_amx()
        if stage is not Stage.ENCODE:
            quiet_threads.calm_nixl()
        self.vllm_config = options.vllm_config(config, stage, name)
        self._positions = positions_for(self.vllm_config)
        self.core = EngineCore(self.vllm_config, options.MakeExecutor(stage), log_stats=False)
        if stage is Stage.ENCODE:
            self.core.collective_rpc(parameters.drop_language_model)
            self.core.collective_rpc(parameters.skip_positions)
            self.core.collective_rpc(isolate_items)
        self.scheduler = self.core.scheduler
        self.gauges = Gauges(self.scheduler)
        connector = self.scheduler.get_ec_connector()
        assert isinstance(connector, PatchCacheConnector)
        self.connector = connector
        self.scheduler.encoder_cache_manager = ReadyPatchCache(connector, gated=stage is not Stage.ENCODE)
        self._adapters = Adapters(self.core)
        self.handover = Handover(self.scheduler)
        self._packer = OutputPacker()
        self._request_decoder = MsgpackDecoder(EngineCoreRequest)
        self._item_decoder = MsgpackDecoder(MultiModalKwargsItem)
        self.start_s = time.monotonic() - started

    # ---- what it is ------------------------------------------------------------------------------------------------

    def info(self) -> WorkerInfo:
        """What this worker tells the broker when it registers."""
        config = self.vllm_config
        tower_bytes, language_bytes = self.parameter_bytes()
        widths = dict(config.ec_transfer_config.mm_encoder_output_widths) if self.stage is Stage.ENCODE else {}
        return WorkerInfo(
            model=config.model_config.model,
            widths=widths,
            dtype=str(config.model_config.dtype).removeprefix("torch."),
            owner=str(config.ec_transfer_config.ec_connector_extra_config["owner"]),
            max_batch_tokens=config.scheduler_config.max_num_batched_tokens,
            max_num_seqs=config.scheduler_config.max_num_seqs,
            kv=self._kv_peer() if self.stage is Stage.PREFILL else None,
            kv_capacity_tokens=self._kv_capacity_tokens(),
            tower_bytes=tower_bytes,
            language_bytes=language_bytes,
            start_s=self.start_s,
        )

    def parameter_bytes(self) -> tuple[int, int]:
        """Bytes of parameters on all devices of this engine: of the tower and projector, and of everything else."""
        counts = self.core.collective_rpc(parameters.parameter_bytes)
        return sum(tower for tower, _ in counts), sum(language for _, language in counts)

    def _kv_peer(self) -> KvPeer:
        connector = self.scheduler.get_kv_connector().connector_scheduler
        return KvPeer(
            engine_id=connector.engine_id,
            host=connector.side_channel_host,
            port=connector.side_channel_port,
            tp_size=connector.transfer_tp_size,
        )

    def _kv_capacity_tokens(self) -> int:
        cache = self.vllm_config.cache_config
        return 0 if self.stage is Stage.ENCODE else int(cache.num_gpu_blocks or 0) * int(cache.block_size)

    # ---- feeding it ------------------------------------------------------------------------------------------------

    def add_encode(self, job: EncodeJob, frames: Sequence[bytes]) -> str:
        """Queues one patch; returns the id of its engine request, which is also the item's identifier.

        Raises:
            ValueError: it is too large for this engine, and would wait for ever.
        """
        most = min(self.scheduler.max_num_encoder_input_tokens, self.vllm_config.model_config.max_model_len)
        if not 1 <= job.num_tokens <= most:
            raise ValueError(f"it has {job.num_tokens} embeddings; this worker encodes 1 to {most} at once")
        item = self._item_decoder.decode(frames)
        name = str(job.job_id)
        feature = MultiModalFeatureSpec(
            data=item,
            modality=job.modality,
            identifier=name,
            mm_position=PlaceholderRange(offset=0, length=job.num_tokens),
        )
        request = EngineCoreRequest(
            request_id=name,
            prompt_token_ids=[0] * job.num_tokens,
            mm_features=[feature],
            sampling_params=SamplingParams(max_tokens=1, temperature=0.0),
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        self.connector.set_write_slot(name, job.slot)
        self._add(request)
        return name

    def add_prefill(
        self,
        leg_id: str,
        frames: Sequence[bytes],
        output_token_ids: Sequence[int] = (),
        samples: bool = False,
        keeps_kv: bool = True,
    ) -> bool:
        """Queues a request to be prefilled.

        Args:
            leg_id: its name in the engine; the push connector must never see the same one twice.
            frames: the engine request.
            output_token_ids: what earlier legs have sampled; it follows the prompt.
            samples: whether its one token counts; otherwise it is thrown away.
            keeps_kv: whether its KV is kept for a decode worker.

        Returns:
            Whether that token is the last one that the request may have.
        """
        request = self._leg(leg_id, frames, output_token_ids)
        sampling = request.sampling_params
        room = self.vllm_config.model_config.max_model_len - len(request.prompt_token_ids)
        is_last = bool(min(sampling.max_tokens - len(output_token_ids), room) <= 1)
        if samples:
            sampling.max_tokens, sampling.min_tokens = 1, min(1, max(0, sampling.min_tokens - len(output_token_ids)))
        else:
            sampling = SamplingParams(
                max_tokens=1, temperature=0.0, prompt_logprobs=sampling.prompt_logprobs, detokenize=False
            )
        if keeps_kv:
            sampling.extra_args = {"kv_transfer_params": {"do_remote_decode": True, "do_remote_prefill": False}}
        request.sampling_params = sampling
        self.connector.expect(request.request_id, _hashes(request))
        self._add(request)
        return is_last

    def add_decode(
        self,
        leg_id: str,
        frames: Sequence[bytes],
        peer: KvPeer,
        output_token_ids: Sequence[int] = (),
        awaits_token: bool = False,
    ) -> None:
        """Queues a request whose KV `peer` will push; the other arguments are as for `add_prefill`.

        `output_token_ids` count towards the limits of the output. With `awaits_token` the request goes on after the
        token that `give_token` brings.
        """
        request = self._leg(leg_id, frames, output_token_ids)
        sampling = request.sampling_params
        sampling.max_tokens -= len(output_token_ids)
        sampling.min_tokens = max(0, sampling.min_tokens - len(output_token_ids))
        sampling.prompt_logprobs = None  # the prefill worker gives them
        sampling.extra_args = (sampling.extra_args or {}) | {
            "kv_transfer_params": {
                "do_remote_prefill": True,
                "do_remote_decode": False,
                "remote_engine_id": peer.engine_id,
                "remote_request_id": request.request_id,
                "remote_host": peer.host,
                "remote_port": peer.port,
                "remote_block_ids": (),
                "tp_size": peer.tp_size,
            }
        }
        self._add(request)
        if awaits_token:
            self.handover.expect(leg_id)

    def give_token(self, leg_id: str, token_ids: Sequence[int]) -> bool:
        """Gives a decode request the token that its prefill worker has sampled; returns whether it was awaited."""
        return self.handover.give(leg_id, token_ids)

    def lacking_token(self) -> frozenset[str]:
        """The decode requests that have their KV but still await their token."""
        return self.handover.lacking()

    def _leg(self, leg_id: str, frames: Sequence[bytes], output_token_ids: Sequence[int]) -> EngineCoreRequest:
        """A leg's request, checked for errors over which vLLM's model runner would end the whole engine."""
        request = self._adapters.prepare(self._request_decoder.decode(frames))
        request.request_id = leg_id
        if self._positions is not None:
            for feature in request.mm_features or ():
                self._positions.check(feature.modality, feature.data, feature.mm_position, request.prompt_token_ids)
        request.prompt_token_ids = [*request.prompt_token_ids, *output_token_ids]
        return request

    def _add(self, request: EngineCoreRequest) -> None:
        self.core.add_request(*self.core.preprocess_add_request(request))

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drops requests; the next steps free their blocks, once nothing reads or writes them."""
        request_ids = list(request_ids)
        self.handover.forget(request_ids)
        self.core.abort_requests([one for one in request_ids if one in self.scheduler.requests])
        if self.stage is Stage.PREFILL:
            self.scheduler.get_kv_connector().connector_scheduler.give_up(request_ids)
        for request_id in request_ids:
            self.connector.forget(request_id)

    # ---- stepping it -----------------------------------------------------------------------------------------------

    def has_requests(self) -> bool:
        """Whether there is anything to step for, including a KV push under way."""
        return bool(self.scheduler.has_requests())

    def waiting(self) -> list[str]:
        """The requests that the scheduler has not started, in order."""
        return [request.request_id for request in self.scheduler.waiting]

    def holds(self, request_id: str) -> bool:
        """Whether the scheduler still has this request; a finished prefill stays there until its KV has been pushed."""
        return request_id in self.scheduler.requests

    def step(self) -> tuple[list[EngineCoreOutput], bool]:
        """Makes one engine step; returns its outputs, and whether the model ran."""
        self.handover.match()
        outputs, executed = self.core.step_fn()
        self.core.post_step(executed)
        return [one for each in (outputs or {}).values() for one in each.outputs], executed

    def kv_arrived(self) -> bool:
        """Whether pushed KV has arrived that the next step can use."""
        return bool(self.scheduler.finished_recving_kv_req_ids)

    def take_written(self) -> Written:
        """The encode jobs whose slots were written since the last call, and those that could not be written."""
        written = Written()
        for report in self.core.collective_rpc(ec_connector.take_written):
            written.done |= report.done
            written.failed |= report.failed
            written.unstored |= report.unstored
            written.storing |= report.storing
            written.num_unsettled += report.num_unsettled
        return written

    def pack(self, output: EngineCoreOutput) -> list[bytes]:
        """An engine output as opaque frames; none if it has only token ids and a finish reason."""
        return self._packer.pack(output)

    def shutdown(self) -> None:
        """Frees the engine."""
        self.core.shutdown()


def _hashes(request: EngineCoreRequest) -> list[str]:
    """The patches that a request's items are made of."""
    return [patch for feature in request.mm_features or () for patch in patches_of(feature.identifier)]

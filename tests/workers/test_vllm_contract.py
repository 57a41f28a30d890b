"""What the workers and the EC connector take for granted of vLLM and NIXL; written against vLLM 0.32 and NIXL 1.5.

Read the failure, then the module it names: workers/engine.py or cache/ec_connector.py.
"""

from __future__ import annotations

import inspect
import sys

import pytest

pytestmark = pytest.mark.engine
WRITTEN_AGAINST = "0.32"


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_the_version_is_the_one_this_was_written_against() -> None:
    import vllm

    assert vllm.__version__.startswith(WRITTEN_AGAINST), (
        f"vLLM is {vllm.__version__}; workers/engine.py and cache/ec_connector.py were written against "
        f"{WRITTEN_AGAINST}: check the tests below, then those two modules"
    )


def test_the_encoder_cache_manager_has_the_methods_and_fields_that_ours_overrides() -> None:
    from vllm.v1.core.encoder_cache_manager import EncoderCacheManager

    assert parameters(EncoderCacheManager.can_allocate) == [
        "self",
        "request",
        "input_id",
        "encoder_compute_budget",
        "num_embeds_to_schedule",
    ]
    assert parameters(EncoderCacheManager.free_encoder_input) == ["self", "request", "input_id"]
    fields = EncoderCacheManager(cache_size=8)
    for name in ("cached", "freeable", "freed", "num_embeds_by_hash", "num_free_slots"):
        assert hasattr(fields, name), name


def test_the_scheduler_prefills_up_to_the_first_item_that_cannot_be_allocated() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    source = inspect.getsource(Scheduler._try_schedule_encoder_inputs)
    assert "num_new_tokens = start_pos - (" in source
    order = [source.index(word) for word in ("check_and_update_cache", "can_allocate", "has_cache_item")]
    assert order == sorted(order), "cached items first, then the gate, then the connector"


def test_the_connector_has_every_method_that_ours_overrides_with_the_same_parameters() -> None:
    from vllm.distributed.ec_transfer.ec_connector.base import ECConnectorBase

    from cache.ec_connector import PatchCacheConnector

    ours = [name for name in vars(PatchCacheConnector) if hasattr(ECConnectorBase, name) and name[0] != "_"]
    assert {"save_caches", "start_load_caches", "ensure_cache_available", "has_cache_item"} <= set(ours)
    for name in ours:
        assert parameters(getattr(PatchCacheConnector, name)) == parameters(getattr(ECConnectorBase, name)), name


def test_the_encode_only_path_still_drops_the_connectors_report() -> None:
    """Where vLLM passes it on, `cache.ec_connector.take_written` can become a connector report."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    source = inspect.getsource(GPUModelRunner.execute_model)
    assert "self._execute_mm_encoder(scheduler_output)" in source
    assert "return make_empty_encoder_model_runner_output(scheduler_output)" in source


def test_an_ec_producer_has_no_language_model() -> None:
    from vllm.config import VllmConfig

    assert "mm_config.mm_encoder_only = True" in inspect.getsource(VllmConfig._resolve_mm_encoder_only)


def test_the_engine_core_makes_its_executor_by_one_call_before_it_shares_out_memory() -> None:
    from vllm.v1.engine.core import EngineCore

    source = inspect.getsource(EngineCore.__init__)
    assert source.count("executor_class(vllm_config)") == source.count("executor_class(") == 1
    assert source.index("executor_class(vllm_config)") < source.index("_initialize_kv_caches(")


def test_deepstack_is_off_in_a_model_made_without_a_tower() -> None:
    """Where it is not, `workers.options` need not have a tower made, and `drop_tower` can go."""
    from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration

    source = inspect.getsource(Qwen3VLForConditionalGeneration.__init__)
    assert "not isinstance(self.visual, StageMissingLayer)" in source


def test_positions_are_computed_where_an_encode_worker_is_told_to_skip_them() -> None:
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    assert "if self.uses_mrope:\n                self._init_mrope_positions" in inspect.getsource(
        GPUModelRunner._update_states
    )
    assert "if self.rope_state is not None:" in inspect.getsource(DefaultModelState.add_request)


def test_items_that_the_prefix_cache_covers_keep_what_their_positions_need() -> None:
    from vllm.multimodal.utils import strip_covered_mm_data

    assert "if elem.field.keep_on_cpu" in inspect.getsource(strip_covered_mm_data)


def test_push_registration_needs_only_what_a_kv_peer_has() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl import push_scheduler

    source = inspect.getsource(push_scheduler.NixlPushConnectorScheduler.update_state_after_alloc)
    for key in ("remote_engine_id", "remote_host", "remote_port", "tp_size"):
        assert f'params["{key}"]' in source, key
    source = inspect.getsource(push_scheduler.NixlBaseConnectorScheduler.__init__)
    for name in ("engine_id", "side_channel_host", "side_channel_port", "transfer_tp_size"):
        assert f"self.{name}" in source, name


def test_legs_with_the_same_request_id_find_each_other() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.push_worker import NixlPushConnectorWorker

    source = inspect.getsource(NixlPushConnectorWorker._pop_matching_registration)
    assert source.index("pop(request_id") < source.index("get_base_request_id")


def test_a_finished_prefill_stays_with_the_scheduler_until_it_has_been_pushed() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    assert "len(self.requests) >" in inspect.getsource(Scheduler.has_finished_requests)


def test_the_progress_thread_of_nixl_can_be_given_a_delay() -> None:
    from vllm.distributed import nixl_utils

    from workers.quiet_threads import NIXL_PROGRESS_US, calm_nixl

    calm_nixl()
    calm_nixl()
    config = sys.modules[nixl_utils.NixlWrapper.__module__].nixlBind.nixlAgentConfig()
    config.pthrDelay = 0
    assert config.pthrDelay == NIXL_PROGRESS_US


def test_the_push_connector_calls_every_method_that_ours_overrides_with_the_same_parameters() -> None:
    from workers.push_connector import PushScheduler
    from workers.push_worker import PushWorker

    for ours in (PushScheduler, PushWorker):
        theirs = ours.__mro__[1]
        names = [name for name, value in vars(ours).items() if inspect.isfunction(value) and hasattr(theirs, name)]
        assert len(names) > 5
        for name in set(names) - {"__init__"}:
            assert len(parameters(getattr(ours, name))) == len(parameters(getattr(theirs, name))), name


def test_the_writer_thread_is_where_registrations_are_sent_and_matched_and_writes_are_started() -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.push_worker import NixlPushConnectorWorker

    source = inspect.getsource(NixlPushConnectorWorker._push_writer_loop)
    order = ("_reg_send_inbox", "_deferred_push_inbox", "_finished_blocks_inbox", "_evict_finished_inbox", "notifs")
    assert [source.index(word) for word in order] == sorted(source.index(word) for word in order)
    for name in ("_send_registration_to_p", "_pop_matching_registration", "_do_start_push_kv", "_handle_push_reg"):
        assert f"self.{name}" in source, name
    assert "self._push_writer_wake.wait()" in source, "ours wakes now and then"


def test_blocks_of_a_decode_request_that_is_aborted_stay_until_its_receive_ends() -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    assert "WAITING_FOR_REMOTE_KVS" in inspect.getsource(Scheduler.finish_requests)
    assert "self._free_blocks(" in inspect.getsource(Scheduler._update_from_kv_xfer_finished)


def test_what_an_engine_counts_for_metrics_is_recorded_where_it_is_read() -> None:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.metrics.stats import PrefixCacheStats

    record = inspect.getsource(KVCacheManager.record_prefix_cache_stats)
    assert "if not self.log_stats" in record and "self.prefix_cache_stats.record(" in record
    assert "self.prefix_cache_stats = PrefixCacheStats()" in inspect.getsource(KVCacheManager.make_prefix_cache_stats)
    assert "if not self.log_stats:" in inspect.getsource(Scheduler.make_stats), "nobody resets it"
    assert "self._preempt_request(" in inspect.getsource(Scheduler.schedule)
    assert isinstance(KVCacheManager.usage, property)
    assert {"queries", "hits"} <= set(vars(PrefixCacheStats()))

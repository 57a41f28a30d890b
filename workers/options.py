"""How a stage's vLLM engine (0.32) is configured and its executor made: the user's options and what the stage needs.

Lives in a worker process; a part of `workers.engine`.
"""

from __future__ import annotations

import secrets
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.v1.executor import Executor

from cache import ec_connector
from epd.config import Config, ConfigError
from epd.errors import one_line
from epd.messages import Stage
from epd.multimodal.recurrent import has_recurrent_state
from workers import parameters, push_connector
from workers.adapters import check_options

DEFAULT_CPU_KV_CACHE_BYTES = 256 << 20
# A model has a tower for each of these that its engine may receive; prefill and decode receive none.
_MODALITIES = ("image", "video", "audio")


def engine_options(config: Config, stage: Stage, name: str) -> dict[str, Any]:
    """The vLLM engine options of a stage: its defaults, then the user's options, then what the stage insists on.

    Raises:
        ConfigError: the user sets something that the stage decides.
    """
    user = config.engine_options(stage.value)
    if fixed := {"ec_transfer_config", "kv_transfer_config", "mm_encoder_only"} & user.keys():
        raise ConfigError(f"the {stage} stage decides {', '.join(sorted(fixed))} itself")
    check_options(user)
    # A progress bar does not belong in a log.
    options: dict[str, Any] = {"model": config.model, "distributed_executor_backend": "uni", "use_tqdm_on_load": False}
    if current_platform.is_cpu():
        options |= {"enforce_eager": True, "kv_cache_memory_bytes": DEFAULT_CPU_KV_CACHE_BYTES}
    if int(user.get("tensor_parallel_size", 1)) > 1 or int(user.get("pipeline_parallel_size", 1)) > 1:
        del options["distributed_executor_backend"]
        if stage is not Stage.ENCODE:
            options["worker_extension_cls"] = "workers.worker_extension.WorkerExtension"
    engine_id = f"{name}-{secrets.token_hex(4)}"
    ec = {
        "ec_connector": ec_connector.CONNECTOR,
        "ec_connector_module_path": ec_connector.MODULE,
        "ec_role": "ec_producer" if stage is Stage.ENCODE else "ec_consumer",
        "engine_id": engine_id,
        "ec_connector_extra_config": {
            "owner": secrets.token_hex(8),
            "min_overlap_tokens": config.prefill.min_overlap_tokens if stage is Stage.PREFILL else 0,
        },
    }
    options |= user
    options |= {"mm_processor_cache_gb": 0, "ec_transfer_config": ec}
    if stage is Stage.ENCODE:
        options |= {"enable_prefix_caching": False, "enable_lora": False}
    else:
        kv = {
            "kv_connector": push_connector.CONNECTOR,
            "kv_connector_module_path": push_connector.MODULE,
            # After a failed push nothing is decoded; the broker decides what becomes of the request.
            "kv_load_failure_policy": "fail",
            "kv_connector_extra_config": {"kv_lease_duration": push_connector.LEASE_S},
            "kv_role": "kv_producer" if stage is Stage.PREFILL else "kv_consumer",
            "engine_id": engine_id,
            "kv_buffer_device": "cpu" if current_platform.is_cpu() else "cuda",
        }
        options |= {"kv_transfer_config": kv, "limit_mm_per_prompt": dict.fromkeys(_MODALITIES, 0)}
    return options


def vllm_config(config: Config, stage: Stage, name: str) -> VllmConfig:
    """The vLLM configuration of a stage.

    A model with DeepStack also adds embeddings to the first layers of its language model, but not if it is made without
    a tower: so it gets one, which `MakeExecutor` drops.

    Raises:
        ConfigError: as for `engine_options`; vLLM refuses it; speculative decoding of a model with a recurrent state.
    """
    options = engine_options(config, stage, name)
    made = _made(options)
    if made.speculative_config is not None and has_recurrent_state(made):
        raise ConfigError(
            f"{config.model}: it has a recurrent state, so how much of a prompt prefill may compute depends on"
            " speculative decoding, of which prefill knows nothing: turn it off"
        )
    vision = getattr(made.model_config.hf_config, "vision_config", None)
    if stage is Stage.ENCODE or not getattr(vision, "deepstack_visual_indexes", None):
        return made
    limits = options["limit_mm_per_prompt"] | {"image": 1, "video": 1}
    options |= {"limit_mm_per_prompt": limits, "skip_mm_profiling": True}
    return _made(options)


def _made(options: dict[str, Any]) -> VllmConfig:
    try:
        made: VllmConfig = EngineArgs(**options).create_engine_config(UsageContext.ENGINE_CONTEXT)
    except (ValueError, TypeError, NotImplementedError, OSError) as error:  # pydantic's are ValueErrors
        raise ConfigError(f"{options['model']}: {one_line(error)}") from error
    return made


class MakeExecutor:
    """Makes vLLM's executor; drops a tower that nothing will run, before memory is divided."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def __call__(self, config: VllmConfig) -> Executor:
        """An executor whose workers have loaded the model."""
        executor = Executor.get_class(config)(config)
        if self._stage is not Stage.ENCODE:
            executor.collective_rpc(parameters.drop_tower)
        return executor

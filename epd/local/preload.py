"""What the zygote loads before it forks: all of vLLM and of our daemons that an engine or the endpoint will use.

Lives in the zygote; owns nothing. If something is missing here, nothing breaks: each fork then loads it itself. Nothing
here
may start a thread or touch a device: forks would not survive that.
"""

# ruff: noqa: F401
from __future__ import annotations

import contextlib

import vllm.distributed.kv_transfer.kv_connector.v1.nixl
import vllm.model_executor.model_loader
import vllm.v1.engine.async_llm
import vllm.v1.engine.core
import vllm.v1.engine.llm_engine
from vllm import EngineArgs
from vllm.model_executor.model_loader.utils import get_model_architecture
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname

import epd.endpoint.daemon
import epd.endpoint.http.server
import epd.local.targets
import workers.daemon
import workers.engine
from epd.config import parse


def warm(config: str) -> None:
    """Reads the model's configuration and imports its class and the platform's worker, once for all forks.

    Errors are left to the daemons, which fail with the reason in their logs.

    Args:
        config: JSON of `epd.config.dump`.
    """
    parsed = parse(config)
    with contextlib.suppress(Exception):
        options = {"model": parsed.model, "distributed_executor_backend": "uni"} | parsed.engine
        engine_config = EngineArgs(**options).create_engine_config()
        resolve_obj_by_qualname(engine_config.parallel_config.worker_cls)
        get_model_architecture(engine_config.model_config)

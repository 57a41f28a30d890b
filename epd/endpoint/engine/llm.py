"""vLLM's `AsyncLLM` with a `PipelineCore` where its engine core would be.

Lives in the endpoint process. Puts it there by patching vLLM's module during construction; `docs/vllm.md` lists all
places where vLLM is patched. Written against vLLM 0.32 (`vllm.v1.engine.async_llm`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace

from vllm.config import VllmConfig
from vllm.v1.engine import async_llm
from vllm.v1.executor import Executor

from epd.endpoint.engine.engine_client import PipelineCore
from epd.endpoint.media import processor_cache
from epd.endpoint.media.bounds import MediaBounds


class PipelineLLM(async_llm.AsyncLLM):
    """vLLM's `AsyncLLM` over a `PipelineCore`. Construct it on the running event loop."""

    def __init__(
        self,
        vllm_config: VllmConfig,
        core: PipelineCore,
        bounds: MediaBounds,
        *,
        log_stats: bool,
        log_requests: bool,
    ) -> None:
        with _core_instead_of_processes(core):
            super().__init__(vllm_config, executor_class=Executor, log_stats=log_stats, log_requests=log_requests)
        core.attach(self.output_processor)
        processor_cache.install(self.renderer, vllm_config, bounds)
        core.output_task = self.output_handler


@contextlib.contextmanager
def _core_instead_of_processes(core: PipelineCore) -> Iterator[None]:
    """While entered, `AsyncLLM.__init__` gets `core` instead of starting engine processes.

    vLLM's constructor has no argument for this. It is synchronous, and nothing else constructs engines in this process.
    """
    original = async_llm.EngineCoreClient
    async_llm.EngineCoreClient = SimpleNamespace(make_async_mp_client=lambda **_: core)
    try:
        yield
    finally:
        async_llm.EngineCoreClient = original

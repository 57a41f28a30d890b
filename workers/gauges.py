"""What an engine counts of itself for metrics, as plain vLLM would: KV in use, prefix cache, preemptions.

Lives in a worker's engine thread. Written against vLLM 0.32 (`vllm.v1.core.sched.scheduler`,
`vllm.v1.core.kv_cache_manager`). vLLM's own statistics are made for each step and reset; what is counted here is not,
so that a heartbeat that is lost loses nothing.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.metrics.stats import PrefixCacheStats


class Gauges:
    """Counts from now on.

    Args:
        scheduler: the engine's.
    """

    def __init__(self, scheduler: Any) -> None:
        self._manager = manager = scheduler.kv_cache_manager
        manager.log_stats, manager.prefix_cache_stats = True, PrefixCacheStats()
        self._num_preemptions = 0
        preempt = scheduler._preempt_request

        def counted(*args: Any, **kwargs: Any) -> Any:
            self._num_preemptions += 1
            return preempt(*args, **kwargs)

        scheduler._preempt_request = counted

    def read(self) -> dict[str, float]:
        """What a heartbeat tells.

        `kv_cache_usage` is a part of 1; `prefix_cache_queries` and `prefix_cache_hits` are tokens, `preemptions`
        requests, both since the engine's start.
        """
        cached = self._manager.prefix_cache_stats
        return {
            "kv_cache_usage": round(float(self._manager.usage), 6),
            "prefix_cache_queries": float(cached.queries),
            "prefix_cache_hits": float(cached.hits),
            "preemptions": float(self._num_preemptions),
        }

"""What an engine holds for requests, by kind. Lives in a worker's engine thread, between two steps.

Written against vLLM 0.32 (`vllm.v1.core.sched.scheduler`, `vllm.v1.core.block_pool`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workers.engine import Engine


def of_engine(engine: Engine) -> dict[str, int]:
    """Requests, patches (or write slots), tokens of prefill workers and KV blocks; all 0 when nothing is in flight.

    Blocks that only the prefix cache remembers count as free, and one block always belongs to vLLM.
    """
    num_running, num_waiting = engine.scheduler.get_request_counts()
    pool = engine.scheduler.kv_cache_manager.block_pool
    return {
        "running": num_running,
        "waiting": num_waiting,
        "engine_requests": len(engine.scheduler.requests),
        "patches": engine.connector.num_held,
        "awaited_tokens": len(engine.handover),
        "kv_blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
    }


def blocks(engine: Engine, wanted: Iterable[str]) -> dict[str, int]:
    """How many KV blocks there are, are in use, and belong to `wanted` requests: arguments of `LeakWatch.observe`."""
    manager = engine.scheduler.kv_cache_manager
    pool = manager.block_pool
    there = [request_id for request_id in wanted if engine.holds(request_id)]
    of_wanted = {block for one in there for group in manager.get_block_ids(one) for block in group}
    return {
        "num_blocks": pool.num_gpu_blocks,
        "num_in_use": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks(),
        "num_wanted": len(of_wanted),
    }

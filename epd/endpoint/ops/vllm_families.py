"""Which of vLLM's metrics a pipeline shows: those whose values are real; all others are not there.

Lives in the endpoint process; pure but for `prometheus_client`. vLLM's `AsyncLLM` registers the families of one engine,
and the endpoint has none: what a front end sees of its requests is real there, what a scheduler knows is not. Written
against vLLM 0.32 (`vllm.v1.metrics.loggers`); a family that is not known here is dropped until it is.
"""

from __future__ import annotations

from typing import NamedTuple

from prometheus_client.registry import CollectorRegistry

PREFIX = "vllm:"

REAL: dict[str, str] = {
    "vllm:num_requests_running": "requests of this endpoint that have given output and have not ended, now",
    "vllm:num_requests_waiting": "requests of this endpoint that have given no output yet, now: in the broker's queue, "
    "being encoded or prefilled",
    "vllm:mm_cache_queries": "items of requests",
    "vllm:mm_cache_hits": "items that were processed before",
    "vllm:prompt_tokens": "prompts of requests that have given output",
    "vllm:prompt_tokens_by_source": "as prefill computed them, or had them in its prefix cache",
    "vllm:prompt_tokens_cached": "of prefill's prefix cache",
    "vllm:generation_tokens": "output of requests",
    "vllm:request_success": "requests that have ended, by reason",
    "vllm:request_prompt_tokens": "requests that have ended",
    "vllm:request_generation_tokens": "requests that have ended",
    "vllm:request_max_num_generation_tokens": "requests that have ended",
    "vllm:request_params_n": "requests that have ended",
    "vllm:request_params_max_tokens": "requests that have ended",
    "vllm:request_prefill_kv_computed_tokens": "requests that have ended",
    "vllm:time_to_first_token_seconds": "measured here: encoding, prefill and all ways between included",
    "vllm:inter_token_latency_seconds": "measured here",
    "vllm:request_time_per_output_token_seconds": "measured here",
    "vllm:e2e_request_latency_seconds": "measured here",
    "vllm:request_decode_time_seconds": "measured here: from the first token to the last",
    "vllm:request_queue_time_seconds": "the broker's story: from its acceptance until its workers were chosen",
    "vllm:request_prefill_time_seconds": "the broker's story: from then to the first token, encoding included",
    "vllm:request_inference_time_seconds": "the broker's story: from then to the end",
    "vllm:lora_requests_info": "adapters of requests that give output",
}
"""Family -> where its value comes from: the endpoint, for its own requests."""


class Told(NamedTuple):
    """A family that workers tell: the key of their `gauges`, and whether it counts up."""

    gauge: str
    counts: bool
    help: str


OF_WORKERS: dict[str, Told] = {
    "vllm:kv_cache_usage_perc": Told("kv_cache_usage", False, "KV cache that a worker has in use; 1 is all of it."),
    "vllm:prefix_cache_queries": Told(
        "prefix_cache_queries", True, "Tokens that a worker looked up in its prefix cache."
    ),
    "vllm:prefix_cache_hits": Told("prefix_cache_hits", True, "Tokens that a worker found in its prefix cache."),
    "vllm:num_preemptions": Told("preemptions", True, "Requests that a worker's engine has preempted."),
}
"""Family -> what each prefill and decode worker tells of it with its heartbeats; `engine` is the worker's name."""

DROPPED: dict[str, str] = {
    "vllm:num_requests_waiting_by_reason": "requests wait in the broker: `epd_broker_held_queued`, and the workers' "
    "`epd_worker_requests`",
    "vllm:num_requests_kv_fetch_by_stage": "KV is pushed by prefill workers, not fetched",
    "vllm:engine_sleep_state": "workers do not sleep, they come and go: `epd_workers`",
    "vllm:external_prefix_cache_queries": "there is no cache of KV outside the workers",
    "vllm:external_prefix_cache_hits": "there is no cache of KV outside the workers",
    "vllm:prompt_tokens_cached_by_source": "the only source is `vllm:prefix_cache_hits` of prefill workers",
    "vllm:admission_rejections": "the broker refuses: `epd_broker_refused_total`",
    "vllm:iteration_tokens_total": "the endpoint makes no engine steps",
    "vllm:request_num_preemptions": "an engine does not tell it by request: `vllm:num_preemptions`",
    "vllm:cache_config_info": "the endpoint has no KV cache: `epd_worker_kv_capacity_tokens`",
    "vllm:estimated_flops_per_gpu": "the endpoint has no GPU",
    "vllm:estimated_read_bytes_per_gpu": "the endpoint has no GPU",
    "vllm:estimated_write_bytes_per_gpu": "the endpoint has no GPU",
    "vllm:corrupted_requests": "workers do not tell it",
    "vllm:watermark_requests": "workers do not tell it",
    "vllm:kv_block_lifetime_seconds": "workers do not tell it",
    "vllm:kv_block_idle_before_evict_seconds": "workers do not tell it",
    "vllm:kv_block_reuse_gap_seconds": "workers do not tell it",
}
"""Family -> why it is not there, and what says more."""


def keep_real(registry: CollectorRegistry) -> None:
    """Takes all of vLLM's families out of a registry that are not real at the endpoint."""
    for collector in set(registry._names_to_collectors.values()):
        name = getattr(collector, "_name", "")
        if name.startswith(PREFIX) and name not in REAL:
            registry.unregister(collector)


def drop_http(registry: CollectorRegistry) -> None:
    """Takes the families of the HTTP instrumentation out of a registry, for the next one to register them.

    It registers them when its middleware is made, and a second one, whose names are taken, counts nothing.
    """
    for collector in {each for name, each in registry._names_to_collectors.items() if name.startswith("http_")}:
        registry.unregister(collector)

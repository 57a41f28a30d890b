"""The pipeline's numbers for Prometheus.

Lives in the endpoint process; pure but for `prometheus_client`. What it knows is the endpoint's `View`: the broker's
last STATUS, with what workers told in their last heartbeats. Which of vLLM's own metrics are shown beside these is in
`vllm_families`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from epd.endpoint.ops.readiness import View, held_by_daemon, missing, num_workers
from epd.endpoint.ops.vllm_families import OF_WORKERS
from epd.messages import Counters, WorkerStatus

# Field of `Counters` -> the metric and its help. Those that only grow are counters, named without "_total".
COUNTS: dict[str, tuple[str, str]] = {
    "num_accepted": ("epd_broker_accepted", "Requests that the broker has taken in."),
    "num_refused": ("epd_broker_refused", "Requests that the broker has refused: too large, or too much at once."),
    "num_finished": ("epd_broker_finished", "Requests that have ended with an answer."),
    "num_failed": ("epd_broker_failed", "Requests that have ended with an error after they were taken in."),
    "num_cancelled": ("epd_broker_cancelled", "Requests that were cancelled."),
    "num_retried": ("epd_broker_retried", "Attempts at requests after one that had lost a worker."),
    "num_encoded": ("epd_broker_encoded", "Patches that were encoded."),
    "num_cache_hits": ("epd_broker_cache_hits", "Patches that were in the cache when a request needed them."),
    "num_coalesced": ("epd_broker_coalesced", "Patches that were being encoded already when a request needed them."),
    "num_evicted": ("epd_broker_evicted", "Patches that have left the cache to make room."),
    "num_stale": ("epd_broker_stale", "Slots that held anything else than was to be read, and were encoded again."),
    "num_fenced": ("epd_broker_fenced", "Messages about attempts that are over, which were ignored."),
    "num_uploads": ("epd_broker_uploads", "Pictures that were uploaded ahead of questions."),
    "encode_s_saved": ("epd_broker_encode_saved_seconds", "Time of encoding that hits and coalescing have saved."),
}
GAUGES: dict[str, tuple[str, str]] = {
    "held_requests": ("epd_broker_held_requests", "Requests that the broker holds, ended ones with slots included."),
    "held_queued": ("epd_broker_held_queued", "Requests that wait in the broker's queue."),
    "held_pins": ("epd_broker_held_pins", "Pins of requests on slots of the cache."),
    "held_encodes": ("epd_broker_held_encodes", "Patches that wait for an encode worker."),
    "held_uploads": ("epd_broker_held_uploads", "Uploaded pictures that have not expired."),
    "cache_bytes_used": ("epd_broker_cache_bytes_used", "Bytes of the pools that have patches in them."),
    "cache_bytes_pinned": ("epd_broker_cache_bytes_pinned", "Bytes of the pools that may not be reused now."),
    "cache_bytes_quarantined": ("epd_broker_cache_bytes_quarantined", "Bytes that a lost worker might still write to."),
    "cache_embeddings": ("epd_broker_cache_embeddings", "Rows of embeddings in the pools."),
    # "_total" is the suffix of counters
    "cache_bytes_total": ("epd_broker_cache_bytes_capacity", "Bytes of the pools."),
}
OWN: dict[str, str] = {
    "epd_workers": "Workers that are registered with the broker, by stage.",
    "epd_link_registered": "1 while the broker knows this endpoint.",
    "epd_ready": "1 while requests can be answered.",
    "epd_requests_in_flight": "Requests of this endpoint that have not ended.",
    "epd_pools": "Pools that hold embeddings.",
    "epd_held": "What a daemon holds, by kind; back at its idle value when nothing is in flight.",
    "epd_worker_requests": "Requests in a worker's engine, by what they do there: running or waiting.",
    "epd_worker_kv_capacity_tokens": "Tokens that a worker's KV cache has room for.",
}


class Collector:
    """Gives Prometheus the pipeline's numbers beside vLLM's; register it with the registry vLLM uses.

    Args:
        view: what the endpoint sees now.
        model_name: as vLLM labels its metrics.
    """

    def __init__(self, view: Callable[[], View], model_name: str = "") -> None:
        self._view, self._model_name = view, model_name

    def describe(self) -> list[Metric]:
        """No names in advance: registering must not collect."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The metrics at this moment."""
        view = self._view()
        workers = _gauge("epd_workers", "stage")
        for stage, count in num_workers(view.status).items():
            workers.add_metric([stage], count)
        yield workers
        yield _value("epd_link_registered", view.registered)
        yield _value("epd_ready", not missing(view))
        yield _value("epd_requests_in_flight", view.num_in_flight)
        held = _gauge("epd_held", "daemon", "kind")
        for daemon, counts in held_by_daemon(view).items():
            for kind, count in counts.items():
                held.add_metric([daemon, kind], count)
        yield held
        if view.status is None:
            return
        yield _value("epd_pools", view.status.num_pools)
        yield from of_broker(view.status.counters)
        yield from of_workers(view.status.workers, self._model_name)


def of_broker(counters: Counters) -> Iterator[Metric]:
    """The broker's own counts."""
    for field, (name, text) in COUNTS.items():
        yield CounterMetricFamily(name, text, getattr(counters, field))
    for field, (name, text) in GAUGES.items():
        yield GaugeMetricFamily(name, text, getattr(counters, field))


def of_workers(workers: list[WorkerStatus], model_name: str) -> Iterator[Metric]:
    """What workers tell of their engines: by vLLM's names where vLLM has one, with a label more."""
    requests = _gauge("epd_worker_requests", "worker", "stage", "state")
    capacity = _gauge("epd_worker_kv_capacity_tokens", "worker", "stage")
    for worker in workers:
        for state in ("running", "waiting"):
            if state in worker.held:
                requests.add_metric([worker.name, worker.stage, state], worker.held[state])
        if worker.info.kv_capacity_tokens:
            capacity.add_metric([worker.name, worker.stage], worker.info.kv_capacity_tokens)
    yield requests
    yield capacity
    for name, told in OF_WORKERS.items():
        kind = CounterMetricFamily if told.counts else GaugeMetricFamily
        family = kind(name, told.help, labels=["model_name", "engine", "stage"])
        for worker in workers:
            if told.gauge in worker.gauges:
                family.add_metric([model_name, worker.name, worker.stage], worker.gauges[told.gauge])
        yield family


def _gauge(name: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, OWN[name], labels=labels)


def _value(name: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, OWN[name], value)

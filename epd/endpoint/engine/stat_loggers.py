"""VLLM's metrics over a pipeline: those of its families that are real, with values that are.

Lives in the endpoint process; touches vLLM's Prometheus logger. Written against vLLM 0.32
(`vllm.v1.metrics.loggers.PrometheusStatLogger`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prometheus_client.registry import CollectorRegistry
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import PrometheusStatLogger

from epd.endpoint.engine.flights import Flights
from epd.endpoint.ops.vllm_families import keep_real
from epd.messages import StoryEvent

# vLLM's attribute -> where in a story its interval begins and ends.
_INTERVALS = {
    "histogram_queue_time_request": ("accepted", "started"),
    "histogram_prefill_time_request": ("started", "first token"),
    "histogram_inference_time_request": ("started", "finished"),
}


class RequestTimes:
    """The histograms of what only the broker knows of a request, fed by its story."""

    def __init__(self) -> None:
        self._histograms: dict[str, Any] = {}

    def take_over(self, logger: PrometheusStatLogger) -> None:
        """From now on vLLM's own times, which cannot tell queue from work here, do not come into these histograms."""
        for name in _INTERVALS:
            [(engine, histogram)] = getattr(logger, name).items()
            self._histograms[name] = histogram
            setattr(logger, name, {engine: _Ignored()})

    def observe(self, story: Sequence[StoryEvent]) -> None:
        """A request has finished."""
        firsts: dict[str, float] = {}
        for event in story:
            firsts.setdefault(event.event, event.at_s)
        for name, histogram in self._histograms.items():
            begin, end = (firsts.get(event) for event in _INTERVALS[name])
            if begin is not None and end is not None:
                histogram.observe(max(0.0, end - begin))


class _Ignored:
    def observe(self, value: float) -> None:
        """Nothing."""


def install(llm: AsyncLLM, flights: Flights, times: RequestTimes, registry: CollectorRegistry) -> None:
    """Makes the metrics of an `AsyncLLM` those of the pipeline; once it has made its loggers."""
    if llm.logger_manager is None:
        return
    for logger in llm.logger_manager.stat_loggers:
        if isinstance(logger, PrometheusStatLogger):
            # Asked for at each scrape: vLLM sets them with outputs only, so that the last to leave stays for ever.
            for gauge in logger.gauge_scheduler_running.values():
                gauge.set_function(lambda: flights.num_running)
            for gauge in logger.gauge_scheduler_waiting.values():
                gauge.set_function(lambda: len(flights) - flights.num_running)
            times.take_over(logger)
    keep_real(registry)

"""What an engine counts of itself for metrics."""

from types import SimpleNamespace

from vllm.v1.metrics.stats import PrefixCacheStats

from workers.gauges import Gauges


class Manager:
    """As vLLM's: it records only where it is told to, and resets only where its scheduler makes statistics."""

    usage = 0.0
    log_stats = False
    prefix_cache_stats = None

    def look_up(self, num_tokens, num_hits, preempted=False):
        if self.log_stats:
            self.prefix_cache_stats.record(num_tokens, num_hits, preempted)


class Scheduler:
    def __init__(self):
        self.kv_cache_manager = Manager()
        self.preempted = []

    def _preempt_request(self, request, timestamp, drop_stale_output=False):
        self.preempted.append((request, timestamp, drop_stale_output))
        return "freed"


def test_counts_go_on_and_usage_is_as_it_is_now():
    scheduler = Scheduler()
    gauges = Gauges(scheduler)
    assert set(gauges.read().values()) == {0.0}
    scheduler.kv_cache_manager.look_up(100, 0)
    scheduler.kv_cache_manager.look_up(100, 64)
    scheduler.kv_cache_manager.look_up(100, 64, preempted=True)  # plain vLLM does not count these
    scheduler.kv_cache_manager.usage = 1 / 3
    assert scheduler._preempt_request("r", 1.0, drop_stale_output=True) == "freed"
    expected = {"kv_cache_usage": 0.333333, "prefix_cache_queries": 200, "prefix_cache_hits": 64, "preemptions": 1}
    assert gauges.read() == gauges.read() == expected
    assert scheduler.preempted == [("r", 1.0, True)]


def test_they_are_vllms_own_statistics():
    scheduler = SimpleNamespace(kv_cache_manager=Manager(), _preempt_request=None)
    Gauges(scheduler)
    assert isinstance(scheduler.kv_cache_manager.prefix_cache_stats, PrefixCacheStats)

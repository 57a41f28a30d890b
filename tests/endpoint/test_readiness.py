"""When the endpoint is ready, and its metrics."""

import msgspec
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from epd.endpoint.ops.metrics import Collector
from epd.endpoint.ops.readiness import View, describe, held_by_daemon, missing
from epd.messages import Stage

from .fake_broker import ALL_STAGES, status_of


def view(registered=True, draining=False, num_in_flight=0, status=None):
    return View(registered=registered, draining=draining, num_in_flight=num_in_flight, status=status)


def test_it_is_ready_with_one_worker_of_each_stage_and_a_pool():
    told = describe(view(status=status_of(ALL_STAGES)))
    assert (told["ready"], told["missing"]) == (True, [])
    assert told["workers"] == {"encode": 1, "prefill": 1, "decode": 1}
    assert [member["stage"] for member in told["members"]] == ["encode", "prefill", "decode"]


@pytest.mark.parametrize(
    ("seen", "reason"),
    [
        (view(registered=False), "no registration with the broker"),
        (view(), "no status from the broker yet"),
        (view(status=status_of([Stage.ENCODE, Stage.DECODE])), "no prefill worker"),
        (view(status=status_of(ALL_STAGES, num_pools=0)), "no pool for embeddings"),
        (view(draining=True, status=status_of(ALL_STAGES)), "this endpoint is shutting down"),
    ],
)
def test_what_is_missing_is_named(seen, reason):
    assert missing(seen) == [reason]


@pytest.mark.parametrize("seen", [view(registered=False), view(num_in_flight=2, status=status_of(ALL_STAGES))])
def test_the_metrics_are_valid_with_and_without_a_status(seen):
    registry = CollectorRegistry()
    registry.register(Collector(lambda: seen))
    families = {each.name: each for each in text_string_to_metric_families(generate_latest(registry).decode())}
    assert {s.labels["stage"] for s in families["epd_workers"].samples} == {"encode", "prefill", "decode"}
    assert families["epd_requests_in_flight"].samples[0].value == seen.num_in_flight
    if seen.status is not None:
        assert families["epd_broker_accepted"].samples[0].name == "epd_broker_accepted_total"
        assert families["epd_broker_held_pins"].type == "gauge"
        assert "epd_broker_cache_bytes_capacity" in families


def test_what_each_daemon_holds_is_shown_by_name_and_kind():
    seen = msgspec.structs.replace(view(status=status_of(ALL_STAGES)), name="endpoint-0", held={"requests": 2})
    told = held_by_daemon(seen)
    assert list(told) == ["endpoint-0", "broker", "encode-0", "prefill-1", "decode-2", "cache"]
    assert told["endpoint-0"] == {"requests": 2} and told["broker"] == {"pins": 1} and told["cache"] == {"pools": 1}
    registry = CollectorRegistry()
    registry.register(Collector(lambda: seen))
    families = {each.name: each for each in text_string_to_metric_families(generate_latest(registry).decode())}
    samples = {(s.labels["daemon"], s.labels["kind"]): s.value for s in families["epd_held"].samples}
    assert samples == {("endpoint-0", "requests"): 2, ("broker", "pins"): 1, ("cache", "pools"): 1}

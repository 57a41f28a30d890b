"""The endpoint's metrics: each that is there has a real value, and the others are not there."""

import asyncio

import pytest
import pytest_asyncio
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from epd.endpoint.engine.stat_loggers import RequestTimes
from epd.endpoint.ops import metrics
from epd.endpoint.ops.metrics import Collector
from epd.endpoint.ops.readiness import View
from epd.endpoint.ops.vllm_families import DROPPED, OF_WORKERS, REAL, drop_http, keep_real
from epd.messages import Counters, Stage, Status, StoryEvent, WorkerInfo, WorkerStatus
from tests.prometheus_lint import check, complaints, families_of

from .fake_broker import ALL_STAGES, never, says, status_of
from .serving import chat_body, serving, until, with_picture


def scraped(view, model_name="m"):
    registry = CollectorRegistry()
    registry.register(Collector(lambda: view, model_name))
    return generate_latest(registry).decode()


def view(status):
    return View(registered=True, draining=False, num_in_flight=2, status=status, name="endpoint-0", held={"tasks": 3})


def worker(name, role, held=None, **gauges):
    info = WorkerInfo(kv_capacity_tokens=4096 if role is not Stage.ENCODE else 0)
    return WorkerStatus(
        name=name, stage=role, incarnation="i", host="h", pid=1, info=info, held=held or {}, gauges=gauges
    )


WORKERS = [
    worker("encode-0", Stage.ENCODE, {"running": 1, "waiting": 4}),
    worker("prefill-0", Stage.PREFILL, {"running": 2, "waiting": 0}, kv_cache_usage=0.25, prefix_cache_queries=100.0,
           prefix_cache_hits=64.0, preemptions=0.0),
    worker("decode-0", Stage.DECODE, {"running": 3, "waiting": 1}, kv_cache_usage=0.5, prefix_cache_queries=10.0,
           prefix_cache_hits=0.0, preemptions=7.0),
]  # fmt: skip


def values(text, name):
    return {tuple(sorted(s.labels.items())): s.value for s in families_of(text)[name].samples}


def test_what_workers_tell_has_vllms_names_and_says_whose_it_is():
    text = scraped(view(Status(workers=WORKERS, counters=Counters(), num_pools=1)))
    labels = [{"engine": name, "stage": stage, "model_name": "m"} for name, stage in
              (("prefill-0", "prefill"), ("decode-0", "decode"))]  # fmt: skip
    keys = [tuple(sorted(each.items())) for each in labels]
    expected = {
        "vllm:kv_cache_usage_perc": (0.25, 0.5),
        "vllm:prefix_cache_queries": (100, 10),
        "vllm:prefix_cache_hits": (64, 0),
        "vllm:num_preemptions": (0, 7),
    }
    assert set(expected) == set(OF_WORKERS)
    for name, told in expected.items():
        assert values(text, name) == dict(zip(keys, told, strict=True)), name
    assert "vllm:prefix_cache_queries_total{" in text and "vllm:kv_cache_usage_perc{" in text
    running = {
        s.labels["worker"]: s.value
        for s in families_of(text)["epd_worker_requests"].samples
        if s.labels["state"] == "running"
    }
    assert running == {"encode-0": 1, "prefill-0": 2, "decode-0": 3}
    assert len(families_of(text)["epd_worker_kv_capacity_tokens"].samples) == 2


@pytest.mark.parametrize("status", [None, status_of(ALL_STAGES), Status(workers=WORKERS, counters=Counters())])
def test_prometheus_finds_no_fault_with_ours(status):
    assert check(scraped(view(status)), "epd_") == []


def test_every_count_of_the_broker_is_shown_and_says_what_it_counts():
    assert set(metrics.COUNTS) | set(metrics.GAUGES) == set(Counters.__struct_fields__)
    texts = [text for _, text in (*metrics.COUNTS.values(), *metrics.GAUGES.values())] + list(metrics.OWN.values())
    assert len(set(texts)) == len(texts)
    assert all(text.endswith(".") and len(text.split()) > 3 and "_" not in text for text in texts)
    counters = Counters(**{name: number for number, name in enumerate(Counters.__struct_fields__, 1)})
    text = scraped(view(Status(workers=[], counters=counters)))
    for field, (name, _) in (metrics.COUNTS | metrics.GAUGES).items():
        assert list(values(text, name).values()) == [getattr(counters, field)], field


def test_a_family_is_real_or_told_by_workers_or_dropped_and_is_one_of_these_only():
    sets = [set(REAL), set(OF_WORKERS), set(DROPPED)]
    assert sum(map(len, sets)) == len(set.union(*sets))
    assert all(text.strip() for text in (*REAL.values(), *DROPPED.values()))


def test_what_is_not_known_to_be_real_is_taken_out_of_a_registry():
    registry = CollectorRegistry()
    kept = Gauge("vllm:num_requests_running", "Kept.", ["engine"], registry=registry)
    Counter("vllm:prefix_cache_queries", "Told by workers.", registry=registry)
    Histogram("vllm:iteration_tokens_total", "Dropped.", registry=registry)
    Counter("vllm:new_in_some_version", "Unknown.", registry=registry)
    Counter("other", "Another's.", registry=registry)
    kept.labels("0").set(4)
    keep_real(registry)
    assert set(families_of(generate_latest(registry).decode())) == {"vllm:num_requests_running", "other"}


def test_http_families_can_be_registered_again():
    registry = CollectorRegistry()
    Counter("http_requests", "Of a middleware that nothing goes through.", ["handler"], registry=registry)
    Counter("mine", "Mine.", registry=registry)
    drop_http(registry)
    Counter("http_requests", "Of the one that counts.", ["handler"], registry=registry)
    assert "mine_total" in generate_latest(registry).decode()


def test_the_rules_find_faults():
    registry = CollectorRegistry()
    Gauge("epd_encode_s_saved", "Seconds.", registry=registry)
    Gauge("epd_things_total", "Things.", registry=registry)
    Gauge("epd_no_help", "", registry=registry)
    Gauge("epd_used_percent", "A part.", registry=registry)
    Gauge("epd_thing_count", "Things.", registry=registry)
    Gauge("epd:colon", "Colon.", registry=registry)
    assert len(complaints(registry.collect())) == 6


def story(**at):
    return [StoryEvent(at_s=at_s, event=event.replace("_", " ")) for event, at_s in at.items()]


def test_times_of_requests_are_those_of_the_brokers_story():
    class Sink:
        def __init__(self):
            self.seen = []

        def observe(self, value):
            self.seen.append(value)

    class Logger:
        def __init__(self):
            self.sinks = [Sink(), Sink(), Sink()]
            queue, prefill, inference = self.sinks
            self.histogram_queue_time_request = {0: queue}
            self.histogram_prefill_time_request = {0: prefill}
            self.histogram_inference_time_request = {0: inference}

    times, logger = RequestTimes(), Logger()
    times.observe(story(accepted=0))  # nothing to tell it to yet
    times.take_over(logger)
    logger.histogram_queue_time_request[0].observe(99.0)  # vLLM's own, which knows no better
    times.observe(story(accepted=0.0, started=1.0, first_token=3.0, finished=6.0))
    times.observe([*story(accepted=0.0, started=0.5, first_token=1.0, retried=2.0), *story(started=3.0, finished=4.5)])
    times.observe(story(accepted=0.0, failed=1.0))
    assert [sink.seen for sink in logger.sinks] == [[1.0, 0.5], [2.0, 0.5], [5.0, 4.0]]


# --- of an endpoint

served_marks = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory):
    async with serving(tmp_path_factory.mktemp("endpoint"), drain_s=1.0) as served:
        yield served


async def scrape(served):
    return (await served.get("/metrics"))[1]


async def value(served, name, **labels):
    found = families_of(await scrape(served))
    samples = [s for family in found.values() for s in family.samples if s.name == name]
    return sum(s.value for s in samples if labels.items() <= s.labels.items())


@pytest.mark.engine
class TestServed:
    pytestmark = served_marks[1]

    async def test_each_family_of_vllm_is_one_that_is_real(self, served):
        served.broker.script = says([100, 101])
        await served.chat()
        found = set(families_of(await scrape(served), "vllm:"))
        assert found <= set(REAL) | set(OF_WORKERS)
        missing = set(REAL) | set(OF_WORKERS)
        assert missing - found <= {"vllm:lora_requests_info"}, "where there are adapters"

    async def test_prometheus_finds_no_fault_with_ours(self, served):
        assert check(await scrape(served), "epd_") == []

    async def test_requests_over_http_are_counted_by_route_and_status(self, served):
        served.broker.script = says([100, 101])
        path = "/v1/chat/completions"
        before = await value(served, "http_requests_total", handler=path, status="2xx")
        took = await value(served, "http_request_duration_seconds_count", handler=path)
        await served.chat()
        await served.post(path, chat_body(max_tokens=-1))
        assert await value(served, "http_requests_total", handler=path, status="2xx") == before + 1
        assert await value(served, "http_requests_total", handler=path, status="4xx") >= 1
        assert await value(served, "http_request_duration_seconds_count", handler=path) == took + 2
        assert await value(served, "http_request_duration_highr_seconds_count") >= 2

    async def test_what_runs_and_waits_is_as_it_is_now(self, served):
        running, waiting = "vllm:num_requests_running", "vllm:num_requests_waiting"
        assert [await value(served, name) for name in (running, waiting)] == [0, 0]
        served.broker.submits.clear()
        served.broker.script = never
        asked = [asyncio.create_task(served.post("/v1/chat/completions", chat_body())) for _ in range(3)]
        await until(lambda: len(served.broker.submits) == 3)
        assert [await value(served, name) for name in (running, waiting)] == [0, 3]
        served.broker.script = says([100] * 1000, delay_s=0.02)
        asked.append(asyncio.create_task(served.post("/v1/chat/completions", chat_body(max_tokens=900))))

        async def runs():
            return await value(served, running) == 1

        await until(runs)
        assert await value(served, waiting) == 3
        for each in asked:  # all clients go away, and nobody else comes
            each.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        await served.idle()
        assert [await value(served, name) for name in (running, waiting)] == [0, 0]

    async def test_what_workers_tell_follows_their_status(self, served):
        labels = {"engine": "decode-0", "stage": "decode", "model_name": "digits"}
        for usage in (0.25, 0.75, 0.0):
            gauges = {"kv_cache_usage": usage, "prefix_cache_queries": 8.0}
            served.broker.status = Status(
                workers=[*status_of(ALL_STAGES).workers[:2], worker("decode-0", Stage.DECODE, **gauges)],
                counters=Counters(),
                num_pools=1,
            )
            await served.broker.send(served.broker.status)

            async def told(usage=usage):
                return await value(served, "vllm:kv_cache_usage_perc", **labels) == usage

            await until(told)
        assert await value(served, "vllm:prefix_cache_queries_total", **labels) == 8
        await served.broker.set_workers(*ALL_STAGES)

    async def test_items_that_come_again_are_hits(self, served):
        served.broker.script = says([100])
        before = [await value(served, f"vllm:mm_cache_{name}_total") for name in ("queries", "hits")]
        for _ in range(3):
            await served.chat(messages=[{"role": "user", "content": with_picture()}])
        after = [await value(served, f"vllm:mm_cache_{name}_total") for name in ("queries", "hits")]
        assert [b - a for a, b in zip(before, after, strict=True)] == [3, 2]

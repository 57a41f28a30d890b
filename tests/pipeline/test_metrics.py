"""The pipeline's metrics beside those of one plain vLLM under the same load: equal, or of the workers, or not there."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable

import httpx
import pytest

from benchmarks.servers import Running
from epd.endpoint.ops.vllm_families import DROPPED, OF_WORKERS, REAL
from tests.pipeline.chats import ask, chat, scribble
from tests.prometheus_lint import check, families_of

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

# What the same requests add to both, exactly: sums of histograms of tokens, counts of all, counters.
COUNTED = (
    "vllm:prompt_tokens_total", "vllm:prompt_tokens_by_source_total", "vllm:prompt_tokens_cached_total",
    "vllm:generation_tokens_total", "vllm:request_success_total", "vllm:mm_cache_queries_total",
    "vllm:mm_cache_hits_total", "vllm:request_prompt_tokens_sum", "vllm:request_generation_tokens_sum",
    "vllm:request_params_n_sum", "vllm:request_params_max_tokens_sum", "vllm:request_prefill_kv_computed_tokens_sum",
    "vllm:request_max_num_generation_tokens_sum",
)  # fmt: skip
TIMES = [name for name in REAL if name.endswith("_seconds")]


def samples(http: httpx.Client) -> dict[tuple[str, str], float]:
    """Every sample of vLLM's families: by name and what tells it from its like, without server and engine."""
    found: dict[tuple[str, str], float] = {}
    for family in families_of(http.get("/metrics").text, "vllm:").values():
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine", "le")}
            key = (sample.name, ",".join(f"{k}={v}" for k, v in sorted(labels.items())))
            found[key] = found.get(key, 0.0) + sample.value
    return found


def until(holds: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def load(http: httpx.Client) -> None:
    """Some requests one after another: with pictures that come again, prompts that begin alike, two choices."""
    for body in (
        chat("List the digits.", [scribble(301)], max_tokens=20, ignore_eos=True),
        chat("List the digits.", [scribble(301)], max_tokens=20, ignore_eos=True),
        chat("How many digits are there?" * 30, max_tokens=7, ignore_eos=True),
        chat("How many digits are there?" * 30, max_tokens=9, ignore_eos=True, n=2, temperature=1.0),
    ):
        ask(http, body)


def added(http: httpx.Client, run: Callable[[httpx.Client], None]) -> dict[tuple[str, str], float]:
    before = samples(http)
    run(http)
    time.sleep(2.5)  # a heartbeat of a worker, and one of the endpoint
    after = samples(http)
    return {key: value - before.get(key, 0.0) for key, value in after.items()}


def test_every_family_of_plain_vllm_is_known_here(running: Running, plain: httpx.Client) -> None:
    theirs, ours = (set(families_of(http.get("/metrics").text, "vllm:")) for http in (plain, running.http))
    assert theirs <= set(REAL) | set(OF_WORKERS) | set(DROPPED), "a new family: is it real?"
    assert ours <= set(REAL) | set(OF_WORKERS)
    assert theirs - ours <= set(DROPPED)


def test_the_same_load_adds_the_same(running: Running, plain: httpx.Client) -> None:
    ours, theirs = added(running.http, load), added(plain, load)
    for name in COUNTED:
        a, b = ({key[1]: value for key, value in each.items() if key[0] == name} for each in (ours, theirs))
        assert a and a == b, name
    for name in TIMES:
        a, b = (sum(value for key, value in each.items() if key[0] == f"{name}_count") for each in (ours, theirs))
        assert a == b > 0, name
    for name in ("vllm:request_prefill_time_seconds", "vllm:request_inference_time_seconds"):
        assert ours[(f"{name}_sum", "")] > 0


def test_prefill_workers_look_up_and_find_what_plain_vllm_does(running: Running, plain: httpx.Client) -> None:
    ours, theirs = added(running.http, load), added(plain, load)
    for name in ("vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total"):
        assert ours[(name, "stage=prefill")] == theirs[(name, "")] > 0, name


def test_kv_in_use_shows_while_requests_run_and_is_free_afterwards(running: Running) -> None:
    body = chat("How many digits are there?", max_tokens=700, ignore_eos=True)

    def usage() -> float:
        return samples(running.http)[("vllm:kv_cache_usage_perc", "stage=decode")]

    until(lambda: usage() == 0.0)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, running.http, body) for _ in range(4)]
        seen = [0.0]
        most = 0.0
        while not all(each.done() for each in asked):
            now = samples(running.http)
            seen.append(now[("vllm:kv_cache_usage_perc", "stage=decode")])
            most = max(most, now[("vllm:num_requests_running", "")])
            time.sleep(0.1)
    assert 0.0 < max(seen) <= 1.0
    assert most == 4
    running.wait_idle()
    until(lambda: usage() == 0.0)
    assert samples(running.http)[("vllm:num_requests_running", "")] == 0


def test_prometheus_finds_no_fault_with_ours(running: Running) -> None:
    assert check(running.http.get("/metrics").text, "epd_") == []

"""Workers of another host reach the pool over TCP; here the other host is a name that some daemons are given."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from benchmarks.servers import Running
from epd import hosts
from epd.builtin import DEMO_QUESTION
from epd.config import CacheConfig, PrefillConfig
from epd.local import LocalPipeline
from tests.pipeline.chats import ask, chat, demo, scribble, tokens
from tests.pipeline.conftest import config
from tests.pipeline.test_disaggregation import of, story

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

PICTURES = [demo(), *map(scribble, range(500, 504))]


@contextmanager
def started(*far: str, address: str = "tcp://127.0.0.1:*", prefill_processes: int = 1) -> Iterator[Running]:
    """A pipeline some of whose daemons think that they are on another host."""
    specs = LocalPipeline._specs

    def elsewhere(pipeline: LocalPipeline) -> list:
        found = specs(pipeline)
        for spec in found:
            if spec.name in far:
                spec.env[hosts.VARIABLE] = "far"
        return found

    settings = config(warm_up=False)
    settings.cache = CacheConfig(address=address)
    if prefill_processes > 1:
        settings.engine |= {"kv_cache_memory_bytes": 64 << 20}
        settings.prefill = PrefillConfig(engine={"tensor_parallel_size": prefill_processes})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalPipeline, "_specs", elsewhere)
        running = Running(settings, encode=2, prefill=1, decode=1)
    try:
        yield running
    finally:
        running.close()


def answers(running: Running) -> list:
    return [tokens(ask(running.http, chat(DEMO_QUESTION, [one], max_tokens=12))) for one in PICTURES]


@pytest.fixture(scope="module")
def expected() -> list:
    """What a pipeline on one host answers."""
    with started(address="") as running:
        return answers(running)


@pytest.mark.parametrize("far", [("encode-0", "encode-1"), ("prefill-0",), ("encode-1", "decode-0")])
def test_answers_are_the_same_whoever_is_on_another_host(expected: list, far: tuple[str, ...]) -> None:
    with started(*far) as running:
        assert answers(running) == expected
        again = ask(running.http, chat(DEMO_QUESTION, [PICTURES[0]], max_tokens=12, cache_salt="not seen"))
        encoded = of(story(running.http, again), "encoded")
        assert {one["worker"] for one in encoded} == {"encode-0", "encode-1"}
        running.wait_idle()


@pytest.mark.timeout(400)
def test_a_model_in_several_processes_gets_what_one_of_them_has_fetched(expected: list) -> None:
    with started("prefill-0", prefill_processes=2) as running:
        assert tokens(ask(running.http, chat(DEMO_QUESTION, [PICTURES[0]], max_tokens=12))) == expected[0]
        running.wait_idle()


def test_a_cache_that_is_killed_and_comes_back_is_reached_again(expected: list) -> None:
    with started("encode-0", "encode-1") as running:
        assert answers(running)[:2] == expected[:2]
        running.signal("cache", signal.SIGKILL)
        assert answers(running) == expected
        running.wait_idle()


@pytest.mark.parametrize("far", [("encode-0", "encode-1"), ("prefill-0",)])
def test_a_cache_that_is_silent_for_a_moment_costs_no_request(expected: list, far: tuple[str, ...]) -> None:
    """Longer than a question to it may take; it may or may not be taken for lost by then."""
    with started(*far) as running, ThreadPoolExecutor() as pool:
        running.signal("cache", signal.SIGSTOP)
        answer = pool.submit(answers, running)
        time.sleep(2.6)
        running.signal("cache", signal.SIGCONT)
        assert answer.result(60) == expected
        running.wait_idle()


def test_without_an_address_only_workers_that_reach_the_pool_encode(expected: list) -> None:
    with started("encode-1", address="") as running:
        assert answers(running) == expected
        reply = ask(running.http, chat(DEMO_QUESTION, [PICTURES[0]], max_tokens=12, cache_salt="not seen"))
        encoded = of(story(running.http, reply), "encoded")
        assert {one["worker"] for one in encoded} == {"encode-0"}

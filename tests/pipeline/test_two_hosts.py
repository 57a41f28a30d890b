"""Workers of another host reach the pool over TCP; here the other host is a name that some daemons are given."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from benchmarks.servers import Running
from epd.builtin import DEMO_QUESTION
from epd.config import CacheConfig
from epd.local import LocalPipeline
from epd.process import hosts
from tests.pipeline.chats import ask, chat, demo, scribble, tokens
from tests.pipeline.conftest import config
from tests.pipeline.test_disaggregation import of, story

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

PICTURES = [demo(), *map(scribble, range(500, 504))]


@contextmanager
def on_another_host(*far: str) -> Iterator[None]:
    """Pipelines that are started meanwhile have daemons that think that they are on another host."""
    specs = LocalPipeline._specs

    def elsewhere(pipeline: LocalPipeline) -> list:
        found = specs(pipeline)
        for spec in found:
            if spec.name in far:
                spec.env[hosts.VARIABLE] = "far"
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalPipeline, "_specs", elsewhere)
        yield


@contextmanager
def started(*far: str, address: str = "tcp://127.0.0.1:*") -> Iterator[Running]:
    """A pipeline some of whose daemons are on another host."""
    settings = config(warm_up=False)
    settings.cache = CacheConfig(address=address)
    with on_another_host(*far):
        running = Running(settings, restart=True, encode=2, prefill=1, decode=1)
    try:
        yield running
    finally:
        running.close()


def answers(running: Running, **more: str) -> list:
    return [tokens(ask(running.http, chat(DEMO_QUESTION, [one], max_tokens=12, **more))) for one in PICTURES]


@pytest.fixture(scope="module")
def expected(running: Running) -> list:
    """What a pipeline on one host answers."""
    return answers(running)


@pytest.fixture(
    scope="module",
    params=[("encode-0", "encode-1"), ("encode-1", "prefill-0", "decode-0")],
    ids=["all that encode", "all that read, and one that encodes"],
)
def far(request: pytest.FixtureRequest) -> Iterator[Running]:
    """A pipeline whose cache is on another host than these."""
    with started(*request.param) as made:
        yield made


def test_answers_are_the_same_whoever_is_on_another_host(expected: list, far: Running) -> None:
    assert answers(far) == expected
    again = ask(far.http, chat(DEMO_QUESTION, [PICTURES[0]], max_tokens=12, cache_salt="not seen"))
    encoded = of(story(far.http, again), "encoded")
    assert {one["worker"] for one in encoded} == {"encode-0", "encode-1"}
    far.wait_idle()


def test_a_cache_that_is_silent_for_a_moment_costs_no_request(expected: list, far: Running) -> None:
    """Longer than a question to it may take; it may or may not be taken for lost by then."""
    with ThreadPoolExecutor() as pool:
        far.signal("cache", signal.SIGSTOP)
        answer = pool.submit(answers, far, cache_salt="silent")
        time.sleep(2.6)
        far.signal("cache", signal.SIGCONT)
        assert answer.result(60) == expected
    far.wait_idle()


def test_a_cache_that_is_killed_and_comes_back_is_reached_again(expected: list, far: Running) -> None:
    before = far.pid("cache")
    far.signal("cache", signal.SIGKILL)
    assert answers(far, cache_salt="killed") == expected
    assert far.pid("cache") != before
    far.wait_idle()


def test_without_an_address_only_workers_that_reach_the_pool_encode(expected: list) -> None:
    with started("encode-1", address="") as running:
        assert answers(running) == expected
        reply = ask(running.http, chat(DEMO_QUESTION, [PICTURES[0]], max_tokens=12, cache_salt="not seen"))
        encoded = of(story(running.http, reply), "encoded")
        assert {one["worker"] for one in encoded} == {"encode-0"}

"""A decode worker whose KV cache is too small for what it has begun: preempted requests are still answered right."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator

import pytest

from benchmarks.servers import Running
from epd.config import BrokerConfig, StageConfig
from tests.pipeline.chats import ask, chat, scribble, tokens
from tests.pipeline.conftest import config
from tests.pipeline.test_disaggregation import of, story

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]

NUM_REQUESTS = 6
KV_BYTES = 18 << 19  # room for 17 blocks of 128 tokens; the answers grow to more than twice that


@pytest.fixture(scope="module")
def small() -> Iterator[Running]:
    """A pipeline that promises hardly any room for output on a decode worker that has little."""
    settings = config()
    settings.broker = BrokerConfig(decode_reserve_tokens=16)
    settings.decode = StageConfig(engine={"kv_cache_memory_bytes": KV_BYTES})
    running = Running(settings, encode=1, prefill=1, decode=1)
    yield running
    running.close()


def body(seed: int) -> dict:
    return chat("List the digits.", [scribble(3000 + seed)], max_tokens=700, ignore_eos=True)


def test_preempted_requests_are_prefilled_again_from_the_cache_and_lose_no_token(small: Running) -> None:
    alone = [tokens(ask(small.http, body(seed))) for seed in range(NUM_REQUESTS)]
    with concurrent.futures.ThreadPoolExecutor(NUM_REQUESTS) as pool:
        answers = list(pool.map(lambda seed: ask(small.http, body(seed)), range(NUM_REQUESTS)))
    preempted = sum(bool(of(story(small.http, answer), "preempted")) for answer in answers)
    assert preempted, "the test must see what it is about"
    different = [i for i, answer in enumerate(answers) if tokens(answer) != alone[i]]
    assert not different
    small.wait_idle()

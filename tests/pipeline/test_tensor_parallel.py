"""Workers of several processes, each with a part of the weights: the same answers, and the parts are the whole."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from benchmarks.servers import Running
from epd.builtin import DEMO_QUESTION
from epd.config import CacheConfig, PrefillConfig, StageConfig
from tests.pipeline.chats import ask, chat, demo, scribble, tokens
from tests.pipeline.conftest import config
from tests.pipeline.test_two_hosts import on_another_host

pytestmark = [pytest.mark.engine, pytest.mark.timeout(400)]

TWO = {"tensor_parallel_size": 2}
BODIES = [
    chat(DEMO_QUESTION, [demo()]),
    chat("How many digits are there?", [demo(), scribble(400)], max_tokens=16, ignore_eos=True),
    chat("List the digits.", max_tokens=16, ignore_eos=True),
]


@contextlib.contextmanager
def pipeline(encode: int, prefill: int, decode: int, far: str) -> Iterator[Running]:
    """One worker of each stage, of so many processes; the worker `far`, if any, is on another host than the cache."""
    settings = config()
    settings.engine |= {"kv_cache_memory_bytes": 64 << 20}
    sizes = [{"tensor_parallel_size": size} if size > 1 else {} for size in (encode, prefill, decode)]
    settings.encode, settings.decode = StageConfig(engine=sizes[0]), StageConfig(engine=sizes[2])
    settings.prefill = PrefillConfig(engine=sizes[1])
    settings.cache = CacheConfig(address="tcp://127.0.0.1:*" if far else "")
    with on_another_host(far):
        running = Running(settings, encode=1, prefill=1, decode=1)
    try:
        yield running
        running.wait_idle()
    finally:
        running.close()


def parameters(running: Running) -> dict[str, tuple[int, int]]:
    """Bytes of tower and of language parameters, by stage."""
    members = running.http.get("/ready").json()["members"]
    return {one["stage"]: (one["tower_bytes"], one["language_bytes"]) for one in members}


@pytest.fixture(scope="module")
def expected(running: Running) -> tuple[list, dict[str, tuple[int, int]]]:
    """Answers and parameters of workers of one process each."""
    return [tokens(ask(running.http, body)) for body in BODIES], parameters(running)


@pytest.mark.parametrize(
    ("sizes", "far"),
    [((2, 1, 2), ""), ((1, 2, 1), ""), ((1, 2, 2), "prefill-0")],
    ids=["encode and decode", "prefill", "prefill on another host, and decode"],
)
def test_stages_of_two_processes_give_the_same_answers(expected: tuple, sizes: tuple[int, int, int], far: str) -> None:
    answers, whole = expected
    with pipeline(*sizes, far) as running:
        assert [tokens(ask(running.http, body)) for body in BODIES] == answers
        held = parameters(running)
    for stage, size in zip(("encode", "prefill", "decode"), sizes, strict=True):
        part = held[stage][stage != "encode"] / whole[stage][stage != "encode"]
        # Norms and position embeddings are on both.
        assert part == 1 if size == 1 else 1 < part < 1.3, stage

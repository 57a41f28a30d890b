"""A decode worker of an M-RoPE model with DeepStack that has too little KV: it prefills videos again, and right."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator

import pytest

from benchmarks.servers import DTYPE, Running
from epd.config import BrokerConfig, Config, EndpointConfig, StageConfig
from tests.models.registry import FAMILIES
from tests.models.test_m_rope import TOLERANCE, user, video
from tests.pipeline.test_disaggregation import of, story

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

NUM_REQUESTS, MAX_TOKENS = 4, 300
KV_BYTES = 10 << 17  # nine blocks of 128 tokens and one for vLLM; the answers grow to five each


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A pipeline that promises hardly any room for output on a decode worker that has little."""
    folder = FAMILIES["qwen3_vl"].folder(tmp_path_factory.mktemp("models"), "qwen3_vl")
    config = Config(
        model=str(folder),
        served_model_name="tiny",
        engine={"max_model_len": 1024, "dtype": DTYPE, "limit_mm_per_prompt": {"video": 1, "image": 1}},
        endpoint=EndpointConfig(port=0),
        broker=BrokerConfig(decode_reserve_tokens=16),
        decode=StageConfig(engine={"kv_cache_memory_bytes": KV_BYTES}),
    )
    running = Running(config, encode=1, prefill=1, decode=1)
    yield running
    running.close()


def ask(running: Running, seed: int) -> dict:
    """The answer to a question about a video that no other seed has."""
    messages = [user(video(range(8000 + 20 * seed, 8012 + 20 * seed), (168, 112)))]
    body = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
    body |= {"return_token_ids": True, "logprobs": True, "top_logprobs": 2}
    reply = running.http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def agree(one: dict, other: dict) -> int:
    """How many tokens two greedy answers share; fails unless what parts them is a tie between two tokens."""
    [mine], [theirs] = one["choices"], other["choices"]
    assert len(mine["token_ids"]) == len(theirs["token_ids"]) == MAX_TOKENS
    lines = zip(mine["logprobs"]["content"], theirs["logprobs"]["content"], strict=True)
    for number, (a, b) in enumerate(lines):
        if mine["token_ids"][number] != theirs["token_ids"][number]:
            best, second = (each["logprob"] for each in a["top_logprobs"])
            assert best - second < 2 * TOLERANCE, number
            return number
        assert a["logprob"] == pytest.approx(b["logprob"], abs=2 * TOLERANCE), number
    return MAX_TOKENS


def test_preempted_requests_about_videos_go_on_as_if_nothing_had_been(small: Running) -> None:
    alone = [ask(small, seed) for seed in range(NUM_REQUESTS)]
    assert all(answer["usage"]["prompt_tokens"] > 128 for answer in alone)
    with concurrent.futures.ThreadPoolExecutor(NUM_REQUESTS) as pool:
        answers = list(pool.map(lambda seed: ask(small, seed), range(NUM_REQUESTS)))
    preempted = [bool(of(story(small.http, answer), "preempted")) for answer in answers]
    assert any(preempted), "the test must see what it is about"
    shared = [agree(answer, before) for answer, before in zip(answers, alone, strict=True)]
    assert sum(shared) > NUM_REQUESTS * MAX_TOKENS // 2, shared
    small.wait_idle()

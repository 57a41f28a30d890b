"""Families whose pictures are encoded whole: tokens and log-probabilities equal to plain vLLM's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.servers import Running
from epd.config import Config, EndpointConfig
from tests.pipeline.chats import png, scribble

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

ENGINE = {"max_model_len": 2048, "dtype": "bfloat16", "limit_mm_per_prompt": {"image": 4}}
MAX_TOKENS = 12
ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def chat(*sizes: tuple[int, int]) -> list[dict]:
    """Messages about pictures of these sizes."""
    urls = [png(scribble(5000 + i, size)) for i, size in enumerate(sizes)]
    parts: list[dict] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is in the picture?"}]}]


CHATS = {"one picture": chat((128, 100)), "two pictures": chat((64, 64), (200, 100)), "text only": chat()}


def python(*arguments: str, stdin: str = "") -> str:
    """Runs a module of the tests in a process of its own; returns what it printed last."""
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        input=stdin,
        env=os.environ | ENV,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().rpartition("\n")[2]


@pytest.fixture(scope="module", params=["llava_onevision", "mistral3"])
def answers(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list, list, dict]:
    """What the pipeline and plain vLLM answer to each chat, and what the pipeline's workers hold."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    python("tests.models.tiny", request.param, str(folder))
    task = {
        "engine": ENGINE | {"kv_cache_memory_bytes": 64 << 20},
        "max_tokens": MAX_TOKENS,
        "chats": [*CHATS.values()],
    }
    plain = json.loads(python("tests.models.plain", str(folder), stdin=json.dumps(task)))
    config = Config(
        model=str(folder), served_model_name="tiny", engine=ENGINE, endpoint=EndpointConfig(port=0, max_images=4)
    )
    running = Running(config, encode=2, prefill=1, decode=1)
    try:
        ours = []
        for messages in CHATS.values():
            body = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}
            body |= {"ignore_eos": True, "return_token_ids": True, "logprobs": True}
            reply = running.http.post("/v1/chat/completions", json=body)
            assert reply.status_code == 200, reply.text
            ours.append(reply.json())
        members = {one["name"]: one for one in running.http.get("/ready").json()["members"]}
        running.wait_idle()
    finally:
        running.close()
    return ours, plain, members


@pytest.mark.parametrize("number", range(len(CHATS)), ids=CHATS)
def test_tokens_and_log_probabilities_are_equal(answers: tuple[list, list, dict], number: int) -> None:
    ours, plain = answers[0][number], answers[1][number]
    [choice] = ours["choices"]
    assert choice["token_ids"] == plain["token_ids"]
    assert ours["usage"]["prompt_tokens"] == plain["num_prompt_tokens"]
    found = [line["logprob"] for line in choice["logprobs"]["content"]]
    assert found == pytest.approx(plain["logprobs"], abs=0.03)


def test_the_stages_hold_their_own_parameters_only(answers: tuple[list, list, dict]) -> None:
    for name, member in answers[2].items():
        mine, other = ("tower_bytes", "language_bytes")[:: 1 if name.startswith("encode") else -1]
        assert member[mine] > 100_000, name
        assert member[other] == 0, name

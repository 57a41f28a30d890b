"""Families of models through the real pipeline over HTTP: tokens and log-probabilities equal to plain vLLM's.

Each family has two encode workers, and the broker's count of encoded patches shows that items were really spread.
"""

from __future__ import annotations

import concurrent.futures
import re
import time

import pytest

from benchmarks.servers import DTYPE, Running
from epd.config import Config, EndpointConfig
from tests.models.conftest import Plain
from tests.models.questions import Question, ask, film, picture, pictures, sound, text
from tests.models.registry import FAMILIES, Family

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

MAX_TOKENS = 12
# One prefill and one decode worker: the endpoint sends one request itself.
NUM_WARM_UPS = 1
ENGINE = {"max_model_len": 2048, "dtype": DTYPE}
# More than one block of a model with a recurrent state, whose blocks are as large as that state (1152 tokens here).
_LONG = [text(202), picture(122, 64, 64), picture(123, 200, 100)]
QUESTIONS: dict[str, list[Question]] = {
    "smolvlm": pictures(17, (17, 9)),
    "internvl": [*pictures(7, (1, 3)), ask("a film", 5, film(10, 5))],
    "gemma3": pictures(3, (1, 3)),
    # Its rounding is not plain vLLM's: decode computes the last token of a prompt in a step of its own. These are
    # questions to which no answer hangs on that: the best token is ahead of the next by 0.008 or more.
    "minicpmv": [
        ask("one picture", 5, picture(29, 128, 100)),
        ask("two pictures", 8, picture(78, 64, 64), picture(79, 200, 100)),
        ask("text only", 0, text(2)),
        ask("a film", 5, film(22, 5)),
        ask("after a long text", 8, *_LONG),
        ask("the same again, which is in the prefix cache", 0, *_LONG),
    ],
    "llava": pictures(1, (1, 1)),
    "llava_onevision": [*pictures(1, (1, 1)), ask("a film", 1, film(12, 5))],
    "mistral3": pictures(1, (1, 1)),
    "qwen2_audio": [ask("a sound", 1, sound(1, 7)), ask("two sounds", 2, sound(2, 3), sound(3, 40))],
    "audioflamingo3": [ask("a long sound", 3, sound(4, 70)), ask("a short sound", 1, sound(5, 3))],
    "glmasr": [ask("a long sound", 3, sound(7, 70)), ask("a short sound", 1, sound(8, 3))],
}


class Asked:
    """What the pipeline and plain vLLM answer to each question, and what the pipeline's workers did."""

    def __init__(self, family: Family, questions: list[Question], plain: list[dict], running: Running) -> None:
        self.family, self.questions, self.plain = family, questions, plain
        self.ours: list[dict] = []
        self.num_encoded: list[int] = []
        before = _counts(running, 0)["encoded"]
        done = _num_done(running)
        for question in questions:
            body = {"model": "tiny", "messages": question.messages, "temperature": 0, "max_tokens": MAX_TOKENS}
            body |= {"ignore_eos": True, "return_token_ids": True, "logprobs": True}
            reply = running.http.post("/v1/chat/completions", json=body)
            assert reply.status_code == 200, reply.text
            self.ours.append(reply.json())
            counts = _counts(running, len(self.ours))
            self.num_encoded.append(counts["encoded"] - before)
            before = counts["encoded"]
        running.wait_idle()
        self.shares = [after - early for early, after in zip(done, _num_done(running), strict=True)]
        self.members = {one["name"]: one for one in running.http.get("/ready").json()["members"]}
        self.card = running.http.get("/v1/models").json()["data"][0]


def _num_done(running: Running) -> list[int]:
    """The patches that each encode worker has encoded so far."""
    members = {one["name"]: one for one in running.http.get("/ready").json()["members"]}
    return [members[name]["num_done"] for name in ("encode-0", "encode-1")]


def _counts(running: Running, num_answered: int) -> dict[str, int]:
    """The broker's counts as soon as they are of a moment after so many answers of ours; warming up adds its own."""
    deadline = time.monotonic() + 20
    while True:
        found = re.findall(r"^epd_broker_(\w+)_total (\S+)$", running.http.get("/metrics").text, re.MULTILINE)
        counts = {name: int(float(value)) for name, value in found}
        if counts.get("finished", 0) >= num_answered + NUM_WARM_UPS:
            return counts
        assert time.monotonic() < deadline, counts
        time.sleep(0.1)


@pytest.fixture(scope="module", params=list(QUESTIONS))
def asked(request: pytest.FixtureRequest, plain_vllm: Plain, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """Both servers' answers; they start side by side."""
    family, questions = FAMILIES[request.param], QUESTIONS[request.param]
    folder = family.folder(tmp_path_factory.mktemp("models"), request.param)
    engine = ENGINE | {"limit_mm_per_prompt": family.limits} | family.engine
    task = {
        "model": str(folder),
        "engine": engine | {"kv_cache_memory_bytes": 64 << 20},
        "max_tokens": MAX_TOKENS,
        "chats": [question.messages for question in questions],
    }
    config = Config(
        model=str(folder), served_model_name="tiny", engine=engine, endpoint=EndpointConfig(port=0, max_images=4)
    )
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        plain = pool.submit(plain_vllm, task)
        running = Running(config, encode=2, prefill=1, decode=1)
        try:
            return Asked(family, questions, plain.result(), running)
        finally:
            running.close()


def test_tokens_and_log_probabilities_are_equal(asked: Asked) -> None:
    for question, ours, plain in zip(asked.questions, asked.ours, asked.plain, strict=True):
        [choice] = ours["choices"]
        assert choice["token_ids"] == plain["token_ids"], question.name
        assert ours["usage"]["prompt_tokens"] == plain["num_prompt_tokens"], question.name
        found = [line["logprob"] for line in choice["logprobs"]["content"]]
        assert found == pytest.approx(plain["logprobs"], abs=0.03), question.name


def test_what_was_proved_is_shown(asked: Asked) -> None:
    assert asked.card["epd"]["units"] == asked.family.units
    assert set(asked.card["epd"]["tokens_per_patch"]) == {
        modality for modality, unit in asked.family.units.items() if unit != "item"
    }


def test_items_are_spread_over_both_encode_workers(asked: Asked) -> None:
    assert asked.num_encoded == [question.num_patches for question in asked.questions]
    assert sum(asked.shares) == sum(asked.num_encoded)
    if max(asked.num_encoded) > 2:
        assert all(asked.shares), asked.shares


def test_the_stages_hold_their_own_parameters_only(asked: Asked) -> None:
    for name, member in asked.members.items():
        mine, other = ("tower_bytes", "language_bytes")[:: 1 if name.startswith("encode") else -1]
        assert member[mine] > 100_000, name
        assert member[other] == 0, name

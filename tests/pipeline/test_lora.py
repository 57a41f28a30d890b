"""LoRA adapters of the language model: plain vLLM's answers with the same adapters, and no KV of one for another."""

from __future__ import annotations

import concurrent.futures
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.servers import Running, plain_vllm
from epd.builtin import DEMO_QUESTION, MODEL_NAME
from epd.config import PrefillConfig
from tests.pipeline.adapters import write_adapter
from tests.pipeline.chats import ask, chat, demo, scribble, stream, tokens
from tests.pipeline.conftest import config
from tests.pipeline.test_disaggregation import of, story

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

NAMES = ("red", "blue")
LORA = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8, "block_size": 32}
IMAGES = [scribble(300), scribble(301)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The adapters by name."""
    base = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(base / name, seed) for seed, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def servers(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Running, httpx.Client]]:
    """A pipeline and plain vLLM with the same adapters."""
    modules = [f"{name}={folder}" for name, folder in folders.items()]
    settings = config(serve={"lora_modules": modules, "enable_prompt_tokens_details": True})
    settings.engine |= LORA
    settings.prefill = PrefillConfig(engine={"max_cpu_loras": 3})
    log = tmp_path_factory.mktemp("plain") / "vllm.log"
    options = ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "8", "--lora-modules", *modules]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        starting = pool.submit(Running, settings, encode=1, prefill=1, decode=1)
        try:
            with plain_vllm(log, *options) as plain:
                yield starting.result(), plain
        finally:
            starting.result().close()


@pytest.fixture(scope="module")
def running(servers: tuple[Running, httpx.Client]) -> Running:
    return servers[0]


@pytest.fixture(scope="module")
def epd(running: Running) -> httpx.Client:
    return running.http


@pytest.fixture(scope="module")
def plain(servers: tuple[Running, httpx.Client]) -> httpx.Client:
    return servers[1]


def question(name: str, seed: int = 300, **more: object) -> dict:
    return chat(DEMO_QUESTION, [demo(), scribble(seed)], ignore_eos=True, max_tokens=12) | {"model": name} | more


def test_the_adapters_are_models_of_the_endpoint(epd: httpx.Client, folders: dict[str, Path]) -> None:
    cards = {one["id"]: one for one in epd.get("/v1/models").json()["data"]}
    assert set(cards) == {MODEL_NAME, *NAMES}
    assert [(cards[name]["root"], cards[name]["parent"]) for name in NAMES] == [
        (str(folders[name]), MODEL_NAME) for name in NAMES
    ]


@pytest.mark.parametrize("name", [MODEL_NAME, *NAMES])
def test_tokens_and_log_probabilities_are_equal(epd: httpx.Client, plain: httpx.Client, name: str) -> None:
    body = question(name, logprobs=True)
    ours, theirs = ask(epd, body), ask(plain, body)
    assert tokens(ours) == tokens(theirs)
    found, wanted = (
        [line["logprob"] for line in one["choices"][0]["logprobs"]["content"]] for one in (ours, theirs)
    )  # fmt: skip
    assert found == pytest.approx(wanted, abs=0.03)
    assert ours["model"] == theirs["model"] == name
    assert stream(epd, question(name)) == stream(plain, question(name))


def test_the_adapters_change_the_answer(epd: httpx.Client) -> None:
    answers = [tokens(ask(epd, question(name))) for name in (MODEL_NAME, *NAMES)]
    assert answers[0] != answers[1] != answers[2] != answers[0]


def test_requests_of_both_adapters_and_of_none_at_the_same_time_are_equal(
    running: Running, plain: httpx.Client
) -> None:
    names = (MODEL_NAME, *NAMES)
    bodies = [question(names[i % 3], 310 + i) for i in range(12)]
    expected = [tokens(ask(plain, body)) for body in bodies]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda body: tokens(ask(running.http, body)), bodies))
    assert found == expected
    running.wait_idle()


def test_kv_of_one_adapter_is_never_used_for_another_and_embeddings_are_shared(epd: httpx.Client) -> None:
    def cached(name: str) -> tuple[int, int]:
        answer = ask(epd, chat(DEMO_QUESTION, [scribble(330), scribble(331)]) | {"model": name})
        events = story(epd, answer)
        [prefilled] = of(events, "prefilled")
        told = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert told == int(prefilled["detail"].split()[0])
        return told, len(of(events, "encode"))

    assert [cached(name) for name in (MODEL_NAME, *NAMES)] == [(0, 18), (0, 0), (0, 0)]
    again = [cached(name) for name in (MODEL_NAME, *NAMES)]
    assert [hits > 0 and encoded == 0 for hits, encoded in again] == [True] * 3


def test_the_tower_is_without_adapters_and_no_stage_holds_more_parameters(epd: httpx.Client) -> None:
    members = {one["name"]: one for one in epd.get("/ready").json()["members"]}
    assert members["encode-0"]["language_bytes"] == 0 == members["decode-0"]["tower_bytes"]
    assert members["prefill-0"]["language_bytes"] == members["decode-0"]["language_bytes"] > 1_000_000


def test_an_adapter_that_cannot_be_read_any_more_fails_its_own_requests_only(
    running: Running, epd: httpx.Client, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    away = tmp_path_factory.mktemp("away") / "blue"
    workers = {name: running.pid(name) for name in ("prefill-0", "decode-0")}
    folder = folders["blue"]
    settings = config(serve={"lora_modules": [f"blue={folder}"]})
    settings.engine |= LORA
    lost = Running(settings, encode=1, prefill=1, decode=1)
    try:
        shutil.move(folder, away)
        reply = lost.http.post("/v1/chat/completions", json=question("blue"))
        assert reply.status_code == 500, reply.text
        assert "adapter" in reply.text.lower(), reply.text
        assert tokens(ask(lost.http, question(MODEL_NAME))) == tokens(ask(epd, question(MODEL_NAME)))
        shutil.move(away, folder)
        assert tokens(ask(lost.http, question("blue"))) == tokens(ask(epd, question("blue")))
        lost.wait_idle()
    finally:
        lost.close()
    assert workers == {name: running.pid(name) for name in workers}

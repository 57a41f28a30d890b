"""A model in 8 bits: plain vLLM's answers, and a language model half as large."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.servers import Running, plain_vllm
from epd.builtin import DEMO_ANSWER, DEMO_QUESTION, MODEL_NAME
from epd.config import ConfigError, StageConfig
from epd.messages import Stage
from tests.pipeline.chats import ask, chat, demo, scribble, tokens
from tests.pipeline.conftest import config
from tests.pipeline.quantized import write_quantized

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

DTYPE = "bfloat16"  # the kernels for 8 bits take no float32 on CPUs with AMX
BODIES = {
    "one image": chat(DEMO_QUESTION, [demo()]),
    "two images": chat("How many digits are there?", [scribble(500), demo()], max_tokens=16, ignore_eos=True),
    "text only": chat("List the digits.", max_tokens=16, ignore_eos=True),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_quantized(tmp_path_factory.mktemp("models") / "int8")


@pytest.fixture(scope="module")
def servers(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, httpx.Client]]:
    """A pipeline and plain vLLM with the quantized model."""
    settings = config()
    settings.model, settings.served_model_name = str(model), MODEL_NAME
    settings.engine |= {"dtype": DTYPE}
    settings.decode = StageConfig(engine={"quantization": "compressed-tensors"})
    log = tmp_path_factory.mktemp("plain") / "vllm.log"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        starting = pool.submit(Running, settings, encode=1, prefill=1, decode=1)
        try:
            with plain_vllm(log, "--dtype", DTYPE, model=model) as plain:
                yield starting.result(), plain
        finally:
            starting.result().close()


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_tokens_and_log_probabilities_are_equal(servers: tuple[Running, httpx.Client], body: dict) -> None:
    ours, theirs = (ask(client, body | {"logprobs": True}) for client in (servers[0].http, servers[1]))
    assert tokens(ours) == tokens(theirs)
    found, wanted = (
        [line["logprob"] for line in one["choices"][0]["logprobs"]["content"]] for one in (ours, theirs)
    )  # fmt: skip
    assert found == pytest.approx(wanted, abs=0.03)


def test_the_quantized_model_still_reads_the_picture(servers: tuple[Running, httpx.Client]) -> None:
    assert tokens(ask(servers[0].http, BODIES["one image"]))[0][1].strip() == DEMO_ANSWER


def test_an_option_of_one_stage_reaches_that_stage_only(model: Path) -> None:
    from workers.options import engine_options

    settings = config()
    settings.model = str(model)
    settings.decode = StageConfig(engine={"quantization": "compressed-tensors"})
    given = [
        engine_options(settings, role, "w").get("quantization") for role in (Stage.ENCODE, Stage.PREFILL, Stage.DECODE)
    ]
    assert given == [None, None, "compressed-tensors"]


def test_what_a_stage_decides_itself_cannot_be_set(model: Path) -> None:
    from workers.options import engine_options

    settings = config()
    settings.decode = StageConfig(engine={"kv_transfer_config": {}})
    with pytest.raises(ConfigError, match="kv_transfer_config"):
        engine_options(settings, Stage.DECODE, "w")

"""One pipeline and one plain vLLM for all tests of this folder that only talk to them."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Iterator

import httpx
import pytest

from benchmarks.servers import DTYPE, MAX_IMAGES, MAX_MODEL_LEN, Running, plain_vllm
from epd.config import Config, EndpointConfig


def config(**endpoint: object) -> Config:
    """The configuration of the pipelines in these tests."""
    return Config(
        engine={"max_model_len": MAX_MODEL_LEN, "dtype": DTYPE, "limit_mm_per_prompt": {"image": MAX_IMAGES}},
        endpoint=EndpointConfig(port=0, max_images=MAX_IMAGES, **endpoint),  # type: ignore[arg-type]
    )


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Running, httpx.Client]]:
    """Both servers, started side by side."""
    log = tmp_path_factory.mktemp("plain") / "vllm.log"
    with concurrent.futures.ThreadPoolExecutor() as pool:
        starting = pool.submit(Running, config(), encode=2, prefill=1, decode=1)
        try:
            with plain_vllm(log) as plain:
                yield starting.result(), plain
        finally:
            starting.result().close()


@pytest.fixture(scope="session")
def running(servers: tuple[Running, httpx.Client]) -> Running:
    """The pipeline: two encode workers, one prefill, one decode."""
    return servers[0]


@pytest.fixture(scope="session")
def epd(running: Running) -> httpx.Client:
    """HTTP to the pipeline."""
    return running.http


@pytest.fixture(scope="session")
def plain(servers: tuple[Running, httpx.Client]) -> httpx.Client:
    """HTTP to plain vLLM."""
    return servers[1]

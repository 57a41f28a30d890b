"""The pipelines that several modules of this folder share, by what they are made of; each starts with its first test.

Tests that kill or restart daemons leave them all running and idle.
"""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from benchmarks.servers import DTYPE, MAX_IMAGES, MAX_MODEL_LEN, Running
from epd.builtin import DEMO_QUESTION
from epd.config import Config, EndpointConfig
from tests.nursery import Nursery
from tests.pipeline.chats import ask, chat, demo


def config(**endpoint: object) -> Config:
    """The configuration of the pipelines in these tests."""
    return Config(
        engine={"max_model_len": MAX_MODEL_LEN, "dtype": DTYPE, "limit_mm_per_prompt": {"image": MAX_IMAGES}},
        endpoint=EndpointConfig(port=0, max_images=MAX_IMAGES, **endpoint),  # type: ignore[arg-type]
    )


@pytest.fixture(scope="session", autouse=True)
def starts_are_quick(nursery: Nursery) -> None:
    """See `tests.nursery`."""


@pytest.fixture(scope="package")
def running() -> Iterator[Running]:
    """The pipeline of most tests: two encode workers, one prefill, one decode; what ends stays away."""
    running = Running(config(), encode=2, prefill=1, decode=1)
    yield running
    running.close()


@pytest.fixture(scope="package")
def epd(running: Running) -> httpx.Client:
    """HTTP to the pipeline."""
    return running.http


@pytest.fixture(scope="package")
def pairs() -> Iterator[Running]:
    """Two workers of each stage; what is killed comes back, as under systemd, and soon, however often it is killed."""
    yield from comes_back(2)


@pytest.fixture(scope="package")
def small() -> Iterator[Running]:
    """One worker of each stage; what is killed comes back, soon."""
    yield from comes_back(1)


def comes_back(workers: int) -> Iterator[Running]:
    """A pipeline with so many workers of each stage that has answered once."""
    running = Running(config(), restart=True, encode=workers, prefill=workers, decode=workers)
    running.pipeline.supervisor.max_backoff_s = 0.5
    ask(running.http, chat(DEMO_QUESTION, [demo()]))
    yield running
    running.close()

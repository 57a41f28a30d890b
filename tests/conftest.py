"""What all tests share: each says its ring, and one plain vLLM is there for all that compare with it."""

from __future__ import annotations

import concurrent.futures
import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.forks import Forks
from tests.rings import ring_of

if TYPE_CHECKING:
    from tests.nursery import Nursery

Starting = concurrent.futures.Future[httpx.Client]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Each test's ring goes into the report of `--junitxml`, for `python -m tests.rings`."""
    for item in items:
        file = item.path.relative_to(config.rootpath).as_posix()
        item.user_properties.append(("ring", ring_of(file, [mark.name for mark in item.iter_markers()])))


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """A process that has imported vLLM, and forks for each module that runs an engine of its own."""
    with Forks() as forks:
        yield forks


@pytest.fixture(scope="session")
def nursery() -> Iterator[Nursery]:
    """Pipelines that are started in this process need not import vLLM each for itself."""
    from tests.nursery import Nursery  # which machines with the GPU tests alone cannot import

    with Nursery() as nursery:
        yield nursery


@pytest.fixture(scope="session")
def plain_starting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starting]:
    """Plain vLLM with the built-in model, which starts while whoever needs it starts other things."""
    from benchmarks.servers import plain_vllm  # which machines with the GPU tests alone cannot import

    log = tmp_path_factory.mktemp("plain") / "vllm.log"
    with concurrent.futures.ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
        starting = pool.submit(stack.enter_context, plain_vllm(log))
        yield starting
        concurrent.futures.wait([starting])


@pytest.fixture
def plain(plain_starting: Starting) -> httpx.Client:
    """HTTP to plain vLLM."""
    return plain_starting.result()

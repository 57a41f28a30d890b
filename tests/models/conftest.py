"""Plain vLLM for the tiny models of this folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.forks import Forks
from tests.nursery import Nursery

Plain = Callable[[dict[str, Any]], list[dict[str, Any]]]


@pytest.fixture(scope="session", autouse=True)
def starts_are_quick(nursery: Nursery) -> None:
    """See `tests.nursery`."""


@pytest.fixture(scope="session")
def plain_vllm(forks: Forks) -> Plain:
    """Takes what `tests.models.plain.answers` takes, and returns its answers; may be called in a thread."""
    return lambda task: list(forks.run("tests.models.plain", stdin=json.dumps(task), timeout_s=220))

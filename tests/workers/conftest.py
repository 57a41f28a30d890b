"""Engines that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.workers.kv_pair import Pair


@pytest.fixture(scope="package")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """A prefill and a decode engine."""
    made = Pair(tmp_path_factory.mktemp("engines"))
    yield made
    made.p.close()
    made.d.close()

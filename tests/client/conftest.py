from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from fake_endpoint import FakeEndpoint

from epd.client import AsyncClient


@pytest.fixture
def endpoint() -> Iterator[FakeEndpoint]:
    with FakeEndpoint() as endpoint:
        yield endpoint


@pytest.fixture
async def client(endpoint: FakeEndpoint) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(endpoint.url) as client:
        yield client

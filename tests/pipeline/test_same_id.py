"""Requests that share the id their client gave: each gets its own answer."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import pytest

from benchmarks.servers import Running
from tests.pipeline.chats import ask, chat, scribble, tokens

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]


def test_requests_of_one_client_id_at_once_get_their_own_answers(running: Running) -> None:
    """VLLM's push connector would take their KV for one another's: it strips the random end of an id."""
    bodies = [chat("List the digits.", [scribble(700 + i)], max_tokens=24, ignore_eos=True) for i in range(8)]
    truths = [tokens(ask(running.http, body)) for body in bodies]

    def post(body: dict[str, Any]) -> list:
        reply = running.http.post("/v1/chat/completions", json=body, headers={"X-Request-Id": "the-same"})
        assert reply.status_code == 200, reply.text
        return tokens(reply.json())

    for number in range(3):
        salted = [body | {"cache_salt": f"same id {number}"} for body in bodies]
        with concurrent.futures.ThreadPoolExecutor(len(bodies)) as pool:
            assert list(pool.map(post, salted)) == truths
    running.wait_idle()

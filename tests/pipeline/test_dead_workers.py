"""Workers killed for real while requests run: an explicit end within seconds, and the next request works."""

from __future__ import annotations

import concurrent.futures
import signal
import time
from collections.abc import Iterator

import httpx
import pytest

from benchmarks.servers import Running
from epd.builtin import DEMO_ANSWER, DEMO_QUESTION
from tests.pipeline.chats import ask, chat, demo, scribble, tokens
from tests.pipeline.conftest import config

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]

ERROR_WITHIN_S = 5.0
LONG = chat("List the digits.", [scribble(5)], max_tokens=1900, ignore_eos=True)


@pytest.fixture
def running() -> Iterator[Running]:
    """A pipeline of its own for each test: two workers of each stage."""
    running = Running(config(), encode=2, prefill=2, decode=2)
    ask(running.http, chat(DEMO_QUESTION, [demo()]))
    yield running
    running.close()


def post(client: httpx.Client, body: dict) -> tuple[httpx.Response, float]:
    started = time.monotonic()
    return client.post("/v1/chat/completions", json=body), time.monotonic() - started


def busy_worker(running: Running, stage: str) -> str:
    """The worker of a stage that has something on its hands; waits for it."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for one in running.http.get("/ready").json()["members"]:
            if one["stage"] == stage and one["num_outstanding"]:
                return str(one["name"])
        time.sleep(0.02)
    raise AssertionError(f"no {stage} worker was busy")


def assert_answers(running: Running) -> None:
    [(_, text, _)] = tokens(ask(running.http, chat(DEMO_QUESTION, [demo()])))
    assert text.strip() == DEMO_ANSWER


def test_a_decode_worker_killed_while_it_decodes(running: Running) -> None:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answer = pool.submit(post, running.http, LONG)
        victim = busy_worker(running, "decode")
        killed = time.monotonic()
        running.signal(victim, signal.SIGKILL)
        reply, _ = answer.result()
        took_s = time.monotonic() - killed
    assert reply.status_code == 502, reply.text
    assert victim in reply.json()["error"]["message"]
    assert took_s < ERROR_WITHIN_S
    running.wait_workers("decode", 1)
    assert_answers(running)
    running.wait_idle()


def test_a_stream_whose_decode_worker_is_killed_ends_with_an_error_event(running: Running) -> None:
    with running.http.stream("POST", "/v1/chat/completions", json=LONG | {"stream": True}) as reply:
        assert reply.status_code == 200
        lines = reply.iter_lines()
        next(line for line in lines if '"content"' in line)
        running.signal(busy_worker(running, "decode"), signal.SIGKILL)
        killed = time.monotonic()
        rest = [line for line in lines if line.startswith("data: ")]
    assert time.monotonic() - killed < ERROR_WITHIN_S
    assert any('"error"' in line and "worker_lost" in line for line in rest), rest[-3:]
    assert_answers(running)


def test_a_prefill_worker_killed_while_it_prefills(running: Running) -> None:
    for name in ("prefill-0", "prefill-1"):
        running.signal(name, signal.SIGSTOP)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answer = pool.submit(post, running.http, chat(DEMO_QUESTION, [scribble(6)]))
        victim = busy_worker(running, "prefill")
        killed = time.monotonic()
        running.signal(victim, signal.SIGKILL)
        [other] = {"prefill-0", "prefill-1"} - {victim}
        running.signal(other, signal.SIGCONT)
        reply, _ = answer.result()
        took_s = time.monotonic() - killed
    assert reply.status_code == 502, reply.text
    assert victim in reply.json()["error"]["message"]
    assert took_s < ERROR_WITHIN_S
    running.wait_workers("prefill", 1)
    assert_answers(running)
    running.wait_idle()


def test_an_encode_worker_killed_while_it_encodes(running: Running) -> None:
    for name in ("encode-0", "encode-1"):
        running.signal(name, signal.SIGSTOP)
    body = chat(DEMO_QUESTION, [demo()], cache_salt="kill")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answer = pool.submit(post, running.http, body)
        busy_worker(running, "encode")
        killed = time.monotonic()
        running.signal("encode-0", signal.SIGKILL)
        running.signal("encode-1", signal.SIGCONT)
        reply, _ = answer.result()
        took_s = time.monotonic() - killed
    assert took_s < ERROR_WITHIN_S
    assert reply.status_code == 200, "its patches went to the other worker"
    assert tokens(reply.json())[0][1].strip() == DEMO_ANSWER
    running.wait_workers("encode", 1)
    running.wait_idle()


def test_the_last_encode_worker_killed_and_one_started_again(running: Running) -> None:
    for name in ("encode-0", "encode-1"):
        running.signal(name, signal.SIGKILL)
    body = chat(DEMO_QUESTION, [demo()], cache_salt="none left")
    reply, took_s = post(running.http, body)
    assert reply.status_code in (502, 503), reply.text
    assert "encode" in reply.json()["error"]["message"]
    assert took_s < ERROR_WITHIN_S
    text_only = ask(running.http, chat("How many digits are there?"))
    assert text_only["choices"][0]["finish_reason"]
    running.run(running.pipeline.restart("encode-0"))
    running.wait_workers("encode", 1)
    [(_, text, _)] = tokens(ask(running.http, body))
    assert text.strip() == DEMO_ANSWER
    running.wait_idle()

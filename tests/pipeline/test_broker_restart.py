"""The broker killed for real while requests run: each goes on with the next one, and no token is lost or repeated."""

from __future__ import annotations

import concurrent.futures
import json
import signal
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from benchmarks.servers import Running
from epd.builtin import DEMO_ANSWER, DEMO_QUESTION
from tests.pipeline.chats import ask, chat, demo, scribble, stream, tokens

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

NUM_TOKENS = 700
BODIES = [
    chat("List the digits.", [scribble(61)], max_tokens=NUM_TOKENS, ignore_eos=True),
    chat("List the digits.", [scribble(62), demo()], max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=True),
    chat("Tell me of digits.", max_tokens=NUM_TOKENS, ignore_eos=True),
    chat("Count.", max_tokens=NUM_TOKENS, ignore_eos=True, repetition_penalty=1.1),
]


@pytest.fixture(scope="module")
def running(pairs: Running) -> Running:
    """A pipeline whose daemons come back when they are killed."""
    return pairs


@pytest.fixture(scope="module")
def truth(running: Running) -> list:
    """What undisturbed requests answer."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(lambda body: tokens(ask(running.http, body))[0][:2], BODIES))


@pytest.fixture(autouse=True)
def nothing_is_held(running: Running) -> Iterator[None]:
    """After each test the pipeline is whole and idle."""
    yield
    wait(running, ready=True)
    running.wait_idle()


def wait(running: Running, *, ready: bool) -> None:
    """Returns when /ready says so."""
    deadline = time.monotonic() + 60
    while (told := running.http.get("/ready").json())["ready"] is not ready:
        assert time.monotonic() < deadline, told
        time.sleep(0.05)


def stream_until_it_ends(running: Running, body: dict, begun: threading.Event) -> tuple[list[int], str]:
    """The tokens and the text of a stream; `begun` is set when it has some."""
    text, ids, _ = stream(running.http, body, lambda count: begun.set() if count >= 8 else None)
    return ids, text


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_streams_go_on_with_the_next_broker_with_the_tokens_of_an_undisturbed_run(
    running: Running, truth: list, number: int
) -> None:
    begun = [threading.Event() for _ in BODIES]
    with concurrent.futures.ThreadPoolExecutor(2 * len(BODIES)) as pool:
        streams = [
            pool.submit(stream_until_it_ends, running, body, event) for body, event in zip(BODIES, begun, strict=True)
        ]
        plain = pool.submit(ask, running.http, BODIES[0])
        for event in begun:
            assert event.wait(60)
        running.signal("broker", number)
        late = pool.submit(ask, running.http, BODIES[2])
        assert [each.result() for each in streams] == truth
        assert tokens(plain.result())[0][:2] == truth[0] and tokens(late.result())[0][:2] == truth[2]


def test_a_request_that_cannot_go_on_ends_with_the_reason(running: Running) -> None:
    body = chat("Count.", max_tokens=NUM_TOKENS, ignore_eos=True, presence_penalty=0.5, stream=True)
    with running.http.stream("POST", "/v1/chat/completions", json=body) as reply:
        lines = reply.iter_lines()
        next(lines)
        running.signal("broker", signal.SIGKILL)
        last = [line for line in lines if line.startswith("data: ") and line != "data: [DONE]"][-1]
    assert json.loads(last[6:])["error"]["type"] == "broker_lost"


def test_a_request_that_comes_while_there_is_no_broker_is_answered(running: Running) -> None:
    supervisor = running.pipeline.supervisor
    supervisor.restart_crashed = False
    try:
        running.signal("broker", signal.SIGKILL)
        wait(running, ready=False)
        with concurrent.futures.ThreadPoolExecutor() as pool:
            asks = [pool.submit(ask, running.http, chat(DEMO_QUESTION, [demo()])) for _ in range(3)]
            with pytest.raises(httpx.TimeoutException):  # one that does not stay is forgotten
                running.http.post("/v1/chat/completions", json=BODIES[2], timeout=0.5)
            assert not any(each.done() for each in asks)
            running.run(running.pipeline.restart("broker"))
            for each in asks:
                assert tokens(each.result())[0][1].strip() == DEMO_ANSWER
    finally:
        supervisor.restart_crashed = True

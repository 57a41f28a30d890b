"""Workers killed for real while requests run: these go on elsewhere, and their tokens are an undisturbed run's."""

from __future__ import annotations

import concurrent.futures
import signal
import time
from collections.abc import Iterator

import httpx
import pytest

from benchmarks.servers import Running
from epd.builtin import DEMO_ANSWER, DEMO_QUESTION
from tests.pipeline.chats import ask, chat, demo, scribble, stream, tokens

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

LONG = chat("List the digits.", [scribble(5)], max_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module")
def running(pairs: Running) -> Running:
    """Two workers of each stage; what is killed comes back."""
    return pairs


@pytest.fixture(autouse=True)
def everything_comes_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test all workers are there again and hold nothing."""
    yield
    for name in {"running", "small"} & set(request.fixturenames):
        pipeline = request.getfixturevalue(name)
        for stage in ("encode", "prefill", "decode"):
            pipeline.wait_workers(stage, getattr(pipeline.pipeline.config, stage).workers, within_s=60)
        pipeline.wait_idle()


def post(client: httpx.Client, body: dict) -> httpx.Response:
    return client.post("/v1/chat/completions", json=body)


def busy_worker(running: Running, stage: str) -> str:
    """The worker of a stage that has something on its hands; waits for it."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for one in running.http.get("/ready").json()["members"]:
            if one["stage"] == stage and one["num_outstanding"]:
                return str(one["name"])
        time.sleep(0.02)
    raise AssertionError(f"no {stage} worker was busy")


def events(running: Running, answer: dict) -> list[dict]:
    """The story of an answer's one request."""
    [request] = running.http.get(f"/v1/requests/{answer['id']}").json()["requests"]
    return request["events"]


def retries(running: Running, answer: dict) -> list[str]:
    """Why an answer's request was tried again, each time."""
    return [event["detail"] for event in events(running, answer) if event["event"] == "retried"]


def stream_and_kill(running: Running, body: dict, stage: str, number: int = signal.SIGKILL) -> tuple[str, list[int]]:
    """The text and tokens of a stream whose worker of `stage` is killed after its first few tokens."""
    killed = []

    def kill(count: int) -> None:
        if count >= 5 and not killed:
            killed.append(busy_worker(running, stage))
            running.signal(killed[0], number)

    text, ids, _ = stream(running.http, body, kill)
    assert killed
    return text, ids


@pytest.mark.parametrize("fixture", ["running", "small"])
def test_a_stream_whose_decode_worker_is_killed_goes_on_with_the_same_tokens(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    running = request.getfixturevalue(fixture)
    [(ids, text, _)] = tokens(ask(running.http, LONG))
    assert stream_and_kill(running, LONG, "decode") == (text, ids)


def test_a_stream_whose_decode_worker_is_stopped_goes_on_elsewhere_when_its_time_to_drain_is_over(
    running: Running,
) -> None:
    body = LONG | {"max_tokens": 1900}
    [(ids, text, _)] = tokens(ask(running.http, body))
    assert stream_and_kill(running, body, "decode", signal.SIGTERM) == (text, ids)


@pytest.mark.parametrize("fixture", ["running", "small"])
def test_a_prefill_worker_killed_while_it_prefills(fixture: str, request: pytest.FixtureRequest) -> None:
    running = request.getfixturevalue(fixture)
    body = chat(DEMO_QUESTION, [scribble(6)])
    truth = tokens(ask(running.http, body))
    names = [name for name in running.pipeline.processes if name.startswith("prefill")]
    for name in names:
        running.signal(name, signal.SIGSTOP)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        asked = pool.submit(post, running.http, body)
        victim = busy_worker(running, "prefill")
        running.signal(victim, signal.SIGKILL)
        for other in set(names) - {victim}:
            running.signal(other, signal.SIGCONT)
        reply = asked.result()
    assert reply.status_code == 200, reply.text
    assert tokens(reply.json()) == truth
    [why] = retries(running, reply.json())
    assert victim in why
    assert not [one for one in events(running, reply.json()) if one["event"] == "encode"], "all was in the cache"


def test_a_worker_that_is_stopped_by_a_signal_is_silent_and_its_request_goes_on_elsewhere(running: Running) -> None:
    [(ids, text, _)] = tokens(ask(running.http, LONG))
    stopped = {one["name"] for one in running.http.get("/ready").json()["members"]}
    assert stream_and_kill(running, LONG, "decode", signal.SIGSTOP) == (text, ids)
    [name] = stopped - {one["name"] for one in running.http.get("/ready").json()["members"]}
    running.signal(name, signal.SIGCONT)


def test_an_encode_worker_killed_while_it_encodes(running: Running) -> None:
    for name in ("encode-0", "encode-1"):
        running.signal(name, signal.SIGSTOP)
    body = chat(DEMO_QUESTION, [demo()], cache_salt="kill")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        asked = pool.submit(post, running.http, body)
        busy_worker(running, "encode")
        running.signal("encode-0", signal.SIGKILL)
        running.signal("encode-1", signal.SIGCONT)
        reply = asked.result()
    assert reply.status_code == 200, "its patches went to the other worker"
    assert tokens(reply.json())[0][1].strip() == DEMO_ANSWER


def test_requests_wait_for_the_last_encode_worker_to_come_back(small: Running) -> None:
    small.signal("encode-0", signal.SIGKILL)  # it is back in seconds; until then its patches wait
    body = chat(DEMO_QUESTION, [demo()], cache_salt="none left")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        asked = pool.submit(post, small.http, body)
        assert ask(small.http, chat("How many digits are there?"))["choices"][0]["finish_reason"]
        reply = asked.result()
    assert reply.status_code == 200, reply.text
    assert tokens(reply.json())[0][1].strip() == DEMO_ANSWER

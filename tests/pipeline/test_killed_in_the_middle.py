"""The cache under real kills: an encoder in the middle of a write, a prefill worker in the middle of a read, the cache.

No token is ever wrong, everything recovers, and no slot stays pinned.
"""

from __future__ import annotations

import concurrent.futures
import random
import signal
import time

import httpx
import pytest

from benchmarks.servers import Running
from epd.builtin import DEMO_ANSWER, DEMO_QUESTION
from epd.local import State
from tests.pipeline.chats import ask, chat, demo, scribble, tokens

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

NUM_PICTURES = 6
ROUNDS = 4


@pytest.fixture(scope="module")
def truth(pairs: Running) -> dict[int, list]:
    """What undisturbed requests answer."""
    return {seed: tokens(ask(pairs.http, body(seed, "truth"))) for seed in range(NUM_PICTURES)}


def body(seed: int, salt: str) -> dict:
    """A question about picture `seed`; with a new salt its patches are in no cache."""
    return chat("List the digits.", [scribble(1000 + seed)], max_tokens=12, ignore_eos=True, cache_salt=salt)


def storm(running: Running, victim: str, salt: str, delay_s: float) -> list[httpx.Response]:
    """Asks about all pictures at once and kills `victim` after `delay_s`; returns the answers, in order."""
    with concurrent.futures.ThreadPoolExecutor(NUM_PICTURES) as pool:
        answers = [
            pool.submit(running.http.post, "/v1/chat/completions", json=body(seed, salt))
            for seed in range(NUM_PICTURES)
        ]
        time.sleep(delay_s)
        running.signal(victim, signal.SIGKILL)
        return [one.result() for one in answers]


def wait_back(running: Running, victim: str, dead_pid: int, within_s: float = 30.0) -> None:
    """Returns when a daemon that was killed has registered again as another process."""
    deadline = time.monotonic() + within_s
    daemon = running.pipeline.processes[victim]
    while daemon.pid == dead_pid or daemon.state is not State.READY:
        assert time.monotonic() < deadline, daemon
        time.sleep(0.05)
    while not (told := running.http.get("/ready").json())["ready"]:
        assert time.monotonic() < deadline, told
        time.sleep(0.05)


@pytest.mark.parametrize("victim", ["encode-0", "prefill-0", "cache", "decode-0"])
def test_killed_at_any_moment_every_answer_is_right_or_an_explicit_error(
    request: pytest.FixtureRequest, truth: dict[int, list], victim: str
) -> None:
    # The only decode worker, but one of two that encode or prefill.
    running: Running = request.getfixturevalue("small" if victim == "decode-0" else "pairs")
    rng = random.Random(victim)
    num_right = 0
    for number in range(ROUNDS):
        pid = running.pid(victim)
        replies = storm(running, victim, f"{victim} {number}", rng.uniform(0.0, 0.12))
        for seed, reply in enumerate(replies):
            if reply.status_code == 200:
                assert tokens(reply.json()) == truth[seed], f"round {number}, picture {seed}"
                num_right += 1
            else:
                assert reply.status_code in (502, 503), reply.text
                assert reply.json()["error"]["message"]
        running.wait_idle()
        wait_back(running, victim, pid)
    again = {seed: tokens(ask(running.http, body(seed, f"after {victim}"))) for seed in range(NUM_PICTURES)}
    assert again == truth
    running.wait_idle()
    if victim == "encode-0":
        assert num_right == ROUNDS * NUM_PICTURES, "the other encode worker takes over"


def test_after_all_that_the_picture_is_still_read(pairs: Running, small: Running) -> None:
    for running in (pairs, small):
        [(_, text, _)] = tokens(ask(running.http, chat(DEMO_QUESTION, [demo()])))
        assert text.strip() == DEMO_ANSWER

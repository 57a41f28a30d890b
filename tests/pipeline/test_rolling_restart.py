"""Every daemon restarted in turn while requests keep coming: none fails, and every answer is the usual one."""

from __future__ import annotations

import itertools
import threading
import time

import httpx
import pytest

from benchmarks.servers import Running
from tests.pipeline.chats import ask, chat, scribble, tokens

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

NUM_CLIENTS = 3
ORDER = ("encode-0", "encode-1", "prefill-0", "decode-0", "cache", "broker", "endpoint", "prefill-0", "decode-0")


def bodies() -> list[dict]:
    """Greedy chats: text, pictures that repeat, and long answers that a restart meets in the middle."""
    return [
        chat("How many digits are there?", max_tokens=60, ignore_eos=True),
        chat("List the digits.", [scribble(900)], max_tokens=120, ignore_eos=True),
        chat("List them.", [scribble(901), scribble(902)], max_tokens=40, ignore_eos=True),
    ]


class Client(threading.Thread):
    """Asks one thing after the other until told to stop; every request has a connection of its own, and no retry."""

    def __init__(self, url: str, expected: list[tuple[dict, list]], first: int) -> None:
        super().__init__(daemon=True)
        self._url, self._expected, self._first = url, expected, first
        self._told = threading.Event()
        self.wrong: list[str] = []
        self.num_answers = 0

    def run(self) -> None:
        for number in itertools.count(self._first):
            if self._told.is_set():
                return
            body, usual = self._expected[number % len(self._expected)]
            body = body | {"cache_salt": str(number)} if number % 4 == 3 else body  # new to the cache
            try:
                reply = httpx.post(f"{self._url}/v1/chat/completions", json=body, timeout=60)
            except httpx.HTTPError as error:
                self.wrong.append(repr(error))
                continue
            if reply.status_code != 200:
                self.wrong.append(f"{reply.status_code}: {reply.text}")
            elif tokens(reply.json()) != usual:
                self.wrong.append(f"another answer: {reply.text}")
            self.num_answers += 1

    def stop(self) -> None:
        """Lets the last answer come."""
        self._told.set()
        self.join(60)


def test_a_rolling_restart_of_all_daemons_under_load_fails_no_request(running: Running) -> None:
    expected = [(body, tokens(ask(running.http, body))) for body in bodies()]
    clients = [Client(running.pipeline.url, expected, first) for first in range(NUM_CLIENTS)]
    for client in clients:
        client.start()
    time.sleep(1.0)
    answers = []
    for name in ORDER:
        before = sum(client.num_answers for client in clients)
        running.run(running.pipeline.roll(name))
        time.sleep(1.0)
        answers.append((name, sum(client.num_answers for client in clients) - before))
    for client in clients:
        client.stop()
    wrong = [text for client in clients for text in client.wrong]
    assert not wrong, (answers, wrong[:5])
    assert all(count for _, count in answers), answers
    print(answers)
    running.wait_idle()

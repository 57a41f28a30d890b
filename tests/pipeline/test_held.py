"""What real daemons hold comes back to the idle baseline after any mix of requests."""

from __future__ import annotations

import concurrent.futures
import contextlib
import random
import time

import httpx
import pytest

from benchmarks.servers import Running
from tests.pipeline.chats import chat, demo, scribble

pytestmark = [pytest.mark.engine, pytest.mark.timeout(180)]

# Pools of threads, and what asyncio keeps for them, grow to a bound and stay.
BOUNDED = {"threads"}


def held(running: Running) -> dict[str, dict[str, int]]:
    """What each daemon holds, over a connection that is closed again."""
    with httpx.Client(base_url=running.pipeline.url) as client:
        daemons = client.get("/debug/held").json()["daemons"]
    return {
        name: {kind: count for kind, count in counts.items() if kind not in BOUNDED} for name, counts in daemons.items()
    }


def settled(running: Running) -> dict[str, dict[str, int]]:
    """What they hold when nothing is in flight; waits for the heartbeats that say so."""
    running.wait_idle()
    deadline = time.monotonic() + 20
    counted = ("requests", "patches", "kv_blocks", "running", "waiting", "engine_requests", "exchanges")
    while True:
        now = held(running)
        left = {
            (name, kind): count
            for name, counts in now.items()
            for kind, count in counts.items()
            if kind in counted and count > (kind == "exchanges")  # the one that asks
        }
        if not left:
            return now
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def storm(running: Running, seed: int) -> None:
    """Twenty requests at once: text, pictures, streams, several choices, cancels, and clients that go away."""
    rng = random.Random(seed)

    def one(number: int) -> None:
        images = [[], [demo()], [scribble(700 + number)]][number % 3]
        salt = f"held {seed} {number}"
        body = chat("List the digits.", images, max_tokens=200, ignore_eos=True, n=1 + number % 2, cache_salt=salt)
        headers = {"X-Request-Id": f"held-{seed}-{number}"}
        with httpx.Client(base_url=running.pipeline.url, timeout=60) as client:
            if number % 4 == 0:
                with contextlib.suppress(httpx.TimeoutException):
                    client.post("/v1/chat/completions", json=body, timeout=rng.uniform(0.05, 0.6))
            elif number % 4 == 1:
                with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as reply:
                    next(reply.iter_lines(), None)
            else:
                client.post("/v1/chat/completions", json=body, headers=headers)

    def cancel(number: int) -> None:
        time.sleep(rng.uniform(0.1, 0.8))
        httpx.post(f"{running.pipeline.url}/v1/requests/chatcmpl-held-{seed}-{number}/cancel")

    with concurrent.futures.ThreadPoolExecutor(30) as pool:
        asks = [pool.submit(one, number) for number in range(20)]
        asks += [pool.submit(cancel, number) for number in range(2, 20, 4)]
        for each in asks:
            each.result()


def test_after_a_storm_everything_is_as_before(running: Running) -> None:
    storm(running, 0)  # connections between workers are made once, and stay
    before = settled(running)
    assert {"endpoint", "broker", "cache", "encode-0", "encode-1", "prefill-0", "decode-0"} <= before.keys()
    storm(running, 1)
    deadline = time.monotonic() + 20
    while (now := settled(running)) != before:
        differs = {name: (before.get(name), counts) for name, counts in now.items() if counts != before.get(name)}
        assert time.monotonic() < deadline, differs
        time.sleep(0.5)

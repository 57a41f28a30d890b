"""What the shared cache saves: repeated pictures, and pictures uploaded before the question."""

from __future__ import annotations

import random
import re
import time

import httpx

from benchmarks import upload
from benchmarks.common import Figure, chat, config, data_url, noise, ttft_s
from benchmarks.servers import Running

NUM_REQUESTS = 50
NEW_EVERY = 5
UPLOAD_BLOCKS = 50


def run() -> tuple[list[Figure], dict[str, float]]:
    """Measures; returns the figures and the ratios to quote."""
    running = Running(config(), encode=2, prefill=1, decode=1)
    try:
        for seed in range(5):
            ttft_s(running.http, chat("digits", [data_url(noise(90_000 + seed))]))
        figures, ratios = _repeated(running.http)
        more, upload_ratios = upload.compare(running.http, UPLOAD_BLOCKS)
        return figures + more, ratios | upload_ratios
    finally:
        running.close()


def _repeated(client: httpx.Client) -> tuple[list[Figure], dict[str, float]]:
    """All pictures new, against four of five seen before; another question each time, so that prefill is not cached."""
    rng = random.Random(7)
    figures, ratios, encoded, ttfts = [], {}, {}, {}
    for name in ("every picture new", "80% of pictures repeated"):
        before, times, seen = _counter(client, "encoded"), [], list[int]()
        for number in range(NUM_REQUESTS):
            if name == "every picture new" or number % NEW_EVERY == 0:
                seen.append(10_000 * (1 + len(ttfts)) + number)
                seed = seen[-1]
            else:
                seed = rng.choice(seen)
            body = chat(f"question {number}", [data_url(noise(seed))])
            times.append(ttft_s(client, body) * 1000)
        encoded[name] = _counter(client, "encoded") - before
        ttfts[name] = Figure(f"TTFT, {name}", "ms", times)
        figures += [ttfts[name], Figure(f"patches encoded, {name}", "", [encoded[name]])]
    new, repeated = encoded
    ratios["patches encoded: 80% repeated / all new"] = encoded[repeated] / encoded[new]
    means = {name: sum(figure.values) / len(figure.values) for name, figure in ttfts.items()}
    ratios["mean TTFT: 80% repeated / all new"] = means[repeated] / means[new]
    return figures, ratios


def _counter(client: httpx.Client, name: str) -> float:
    time.sleep(1.5)  # the endpoint hears of the broker's counters with each heartbeat
    found = re.search(rf"^epd_broker_{name}_total ([\d.e+]+)$", client.get("/metrics").text, re.MULTILINE)
    assert found, name
    return float(found[1])

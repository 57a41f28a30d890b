"""What the shared cache saves: repeated pictures, and pictures uploaded before the question."""

from __future__ import annotations

import random
import re
import time

import httpx

from benchmarks.common import Figure, alternate, chat, config, data_url, noise, picture, ttft_s
from benchmarks.servers import Running
from epd.builtin import MODEL_NAME

NUM_REQUESTS = 50
NEW_EVERY = 5
BLOCKS, BLOCK = 10, 5
UPLOAD_AHEAD_S = 1.0


def run() -> tuple[list[Figure], dict[str, float]]:
    """Measures; returns the figures and the ratios to quote."""
    running = Running(config(), encode=2, prefill=1, decode=1)
    try:
        for seed in range(5):
            ttft_s(running.http, chat("digits", [data_url(noise(90_000 + seed))]))
        figures, ratios = _repeated(running.http)
        more, upload_ratios = _uploaded(running.http)
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


def _uploaded(client: httpx.Client) -> tuple[list[Figure], dict[str, float]]:
    """A question about a picture uploaded a second before, against a text of the same number of tokens."""
    num_tokens = _prompt_tokens(client, chat("digits?", [data_url(noise(1))]))
    text = _text_of(client, num_tokens)

    def uploaded(number: int) -> float:
        reply = client.post("/v1/media", content=picture(noise(70_000 + number)))
        assert reply.status_code == 200, reply.text
        time.sleep(UPLOAD_AHEAD_S)
        return ttft_s(client, chat("digits?", [f"epd-media://{reply.json()['id']}"]))

    def text_only(number: int) -> float:
        time.sleep(UPLOAD_AHEAD_S)
        return ttft_s(client, chat(f"{number % 10}{text}"))

    def inline(number: int) -> float:
        time.sleep(UPLOAD_AHEAD_S)
        return ttft_s(client, chat("digits?", [data_url(noise(80_000 + number))]))

    names = {
        "TTFT, text only, as many tokens": text_only,
        "TTFT, picture uploaded 1 s before": uploaded,
        "TTFT, picture in the request": inline,
    }
    found = alternate(BLOCKS, BLOCK, names)
    ratio = found["TTFT, picture uploaded 1 s before"].median / found["TTFT, text only, as many tokens"].median
    return list(found.values()), {f"TTFT: uploaded 1 s before / text only ({num_tokens} tokens)": ratio}


def _prompt_tokens(client: httpx.Client, body: dict) -> int:
    reply = client.post("/v1/chat/completions", json=body | {"stream": False, "max_tokens": 1})
    return int(reply.json()["usage"]["prompt_tokens"])


def _text_of(client: httpx.Client, num_tokens: int) -> str:
    """Words that make a chat prompt of `num_tokens` tokens, after one more digit."""
    text = ""
    while _prompt_tokens(client, chat("1" + text)) < num_tokens:
        text += " 1"
    assert _prompt_tokens(client, chat("1" + text)) == num_tokens, MODEL_NAME
    return text


def _counter(client: httpx.Client, name: str) -> float:
    time.sleep(1.5)  # the endpoint hears of the broker's counters with each heartbeat
    found = re.search(rf"^epd_broker_{name}_total ([\d.e+]+)$", client.get("/metrics").text, re.MULTILINE)
    assert found, name
    return float(found[1])

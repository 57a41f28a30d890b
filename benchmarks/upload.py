"""What a picture costs that was uploaded before its question, compared with text: with the toy and a larger model."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path

import httpx

from benchmarks import larger
from benchmarks.common import Figure, alternate, chat, config, data_url, noise, picture, ttft_s
from benchmarks.servers import Running
from epd.builtin import MODEL_NAME

BLOCK = 1  # a second apart, no request warms the next one; and so a machine that drifts is fairest to all
LARGER_BLOCKS = 30
AHEAD_S = 1.0


def run() -> tuple[list[Figure], dict[str, float]]:
    """Measures with the larger model; returns the figures and the ratios to quote."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        name = f"{larger.make(folder) / 1e6:.0f} M parameters"
        settings = config()
        settings.model, settings.served_model_name = str(folder), MODEL_NAME
        running = Running(settings, encode=2, prefill=1, decode=1)
        try:
            for seed in range(5):
                ttft_s(running.http, chat("digits", [data_url(noise(90_000 + seed))]))
            figures, ratios = compare(running.http, LARGER_BLOCKS)
        finally:
            running.close()
    figures = [dataclasses.replace(figure, name=f"{figure.name}, {name}") for figure in figures]
    return figures, {f"{what}, {name}": ratio for what, ratio in ratios.items()}


def compare(client: httpx.Client, blocks: int) -> tuple[list[Figure], dict[str, float]]:
    """A question about a picture uploaded a second before, a text of as many tokens, and a picture in the request."""
    num_tokens = _prompt_tokens(client, chat("digits?", [data_url(noise(1))]))
    text = _text_of(client, num_tokens)

    def uploaded(number: int) -> float:
        reply = client.post("/v1/media", content=picture(noise(70_000 + number)))
        assert reply.status_code == 200, reply.text
        time.sleep(AHEAD_S)
        return ttft_s(client, chat("digits?", [f"epd-media://{reply.json()['id']}"]))

    def text_only(number: int) -> float:
        time.sleep(AHEAD_S)
        return ttft_s(client, chat(f"{number % 10}{text}"))

    def inline(number: int) -> float:
        body = chat("digits?", [data_url(noise(80_000 + number))])
        time.sleep(AHEAD_S)
        return ttft_s(client, body)

    runs = {
        "TTFT, text only, as many tokens": text_only,
        "TTFT, picture uploaded 1 s before": uploaded,
        "TTFT, picture in the request": inline,
    }
    found = alternate(blocks, BLOCK, runs)
    only, ahead, within = (found[name].median for name in runs)
    ratios = {
        f"TTFT: uploaded 1 s before / text only ({num_tokens} tokens)": ahead / only,
        f"TTFT: in the request / text only ({num_tokens} tokens)": within / only,
    }
    return list(found.values()), ratios


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

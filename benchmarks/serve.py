"""The pipeline beside plain vLLM over HTTP, in one run: time to first token, time to ready, CPU while idle."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
from PIL import Image

from benchmarks.common import Figure, alternate, chat, config, data_url, noise, ttft_s
from benchmarks.servers import Running, plain_vllm
from epd.builtin import DEMO_QUESTION, demo_image_path

BLOCKS, BLOCK = 4, 5
IDLE_S = 10.0


def run(log: Path) -> tuple[list[Figure], dict[str, float]]:
    """Measures; returns the figures and the ratios to quote."""
    started = time.perf_counter()
    running = Running(config(), encode=2, prefill=1, decode=1)
    figures = [Figure("pipeline: start to ready", "s", [time.perf_counter() - started])]
    try:
        idle = _idle_percent(running)
        figures.append(Figure("pipeline: all processes together, idle, of one core", "%", [idle]))
        with plain_vllm(log) as plain:
            found = _ttfts(running.http, plain)
        figures += found.values()
    finally:
        running.close()
    ratios = {
        f"TTFT, {kind}: pipeline / plain vLLM": found[f"pipeline: {kind}"].median / found[f"plain: {kind}"].median
        for kind in ("demo picture, seen before", "a new picture", "four new pictures", "text only")
    }
    return figures, ratios


def _ttfts(ours: httpx.Client, plain: httpx.Client) -> dict[str, Figure]:
    demo = data_url(Image.open(demo_image_path()).convert("RGB"))
    text = chat("What digits are in the image? " * 6)
    for client in (ours, plain):
        for body in (chat(DEMO_QUESTION, [demo]), text):
            ttft_s(client, body)

    def new(client: httpx.Client, count: int, offset: int) -> float:
        urls = [data_url(noise(offset + i)) for i in range(count)]
        return ttft_s(client, chat(DEMO_QUESTION, urls))

    runs = {}
    for name, client in (("pipeline", ours), ("plain", plain)):
        runs[f"{name}: demo picture, seen before"] = lambda _, c=client: ttft_s(c, chat(DEMO_QUESTION, [demo]))
        runs[f"{name}: a new picture"] = lambda n, c=client: new(c, 1, 1000 + n)
        runs[f"{name}: four new pictures"] = lambda n, c=client: new(c, 4, 2000 + 4 * n)
        runs[f"{name}: text only"] = lambda n, c=client: ttft_s(c, chat(f"{n} digits are in the image? " * 6))
    return alternate(BLOCKS, BLOCK, runs)


def _idle_percent(running: Running) -> float:
    time.sleep(2.0)
    pids = [daemon.pid for daemon in running.pipeline.processes.values() if daemon.pid]
    before = sum(map(_cpu_s, pids))
    time.sleep(IDLE_S)
    return (sum(map(_cpu_s, pids)) - before) / IDLE_S * 100


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100

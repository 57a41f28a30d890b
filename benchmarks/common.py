"""What the benchmarks share: new pictures, time to first token over HTTP, medians, and who measured where."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import io
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
from PIL import Image

from benchmarks.servers import DTYPE
from epd.builtin import MODEL_NAME
from epd.config import Config, EndpointConfig

MAX_MODEL_LEN = 2048
NAME_WIDTH = 72


def config() -> Config:
    """The pipeline of all benchmarks: the built-in model, as the tests run it."""
    return Config(
        engine={"max_model_len": MAX_MODEL_LEN, "dtype": DTYPE, "limit_mm_per_prompt": {"image": 8}},
        endpoint=EndpointConfig(port=0, max_images=8),
    )


def noise(seed: int, size: tuple[int, int] = (256, 128)) -> Image.Image:
    """A picture whose patches are all different, and different from those of any other seed."""
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(3 * size[0] * size[1]))


def picture(image: Image.Image) -> bytes:
    """An image as a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_url(image: Image.Image) -> str:
    """An image as a data URL."""
    return "data:image/png;base64," + base64.b64encode(picture(image)).decode()


def chat(question: str, urls: Sequence[str] = (), **more: Any) -> dict[str, Any]:
    """A greedy chat body with pictures before the question."""
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content.append({"type": "text", "text": question})
    return {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 8,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        **more,
    }


def ttft_s(client: httpx.Client, body: dict[str, Any]) -> float:
    """Seconds from sending a streamed chat to its first token."""
    started = time.perf_counter()
    first = 0.0
    with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        assert reply.status_code == 200, reply.read()
        for line in reply.iter_lines():
            if not first and '"token_ids":[' in line.replace(" ", ""):
                first = time.perf_counter() - started
    assert first, "no token came"
    return first


@dataclasses.dataclass(frozen=True)
class Figure:
    """Several measurements of one thing, in one unit."""

    name: str
    unit: str
    values: list[float]

    @property
    def median(self) -> float:
        """The median, to be quoted."""
        return statistics.median(self.values)

    def line(self) -> str:
        """The figure as a line of a table: name, median, least and most, count."""
        low, high = min(self.values), max(self.values)
        name = f"{self.name:<{NAME_WIDTH}}"
        return f"{name} {self.median:10.2f} {self.unit:<4} ({low:.2f} to {high:.2f}, n={len(self.values)})"


def alternate(blocks: int, block: int, runs: dict[str, Callable[[int], float]], unit: str = "ms") -> dict[str, Figure]:
    """Runs each of `runs` `block` times, in turn, `blocks` times over; seconds become milliseconds.

    In turn, so that a machine that drifts is fair to all; in blocks, so that each is as warm as a server in use.
    """
    values: dict[str, list[float]] = {name: [] for name in runs}
    for first in range(0, blocks * block, block):
        for name, run in runs.items():
            values[name] += [run(number) * 1000 for number in range(first, first + block)]
    return {name: Figure(name, unit, found) for name, found in values.items()}


def provenance() -> dict[str, str]:
    """Machine, date and commit of a measurement."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, no GPU",
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "python": platform.python_version(),
    }

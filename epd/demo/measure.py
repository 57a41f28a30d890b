"""What the demo measures: answers over HTTP with their times, and the CPU that idle processes use.

Lives in the user's process; owns nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from epd.client import AsyncClient, Picture

MAX_TOKENS = 64


@dataclass(frozen=True)
class Asked:
    """One answer: `ttft_s` and `total_s` are the client's, from before it reads the picture."""

    answer: str
    ttft_s: float
    total_s: float
    request_id: str


async def ask(
    client: AsyncClient, question: str, picture: Picture, on_text: Callable[[str], None] = lambda _: None
) -> Asked:
    """Asks about a picture and calls `on_text` with each piece of the answer as it comes."""
    started = time.perf_counter()
    ttft_s, answer, request_id = 0.0, "", ""
    async for chunk in client.stream(question, images=[picture], temperature=0.0, max_tokens=MAX_TOKENS):
        if chunk.text:
            ttft_s = ttft_s or time.perf_counter() - started
            answer += chunk.text
            on_text(chunk.text)
        request_id = chunk.request_id or request_id
    return Asked(answer, ttft_s, time.perf_counter() - started, request_id)


async def idle_cpu(pids: Iterable[int], seconds: float = 3.0) -> float:
    """The CPU time that processes use while nothing is asked of them, as a share of one core."""
    watched = list(pids)
    before, started = sum(map(cpu_s, watched)), time.monotonic()
    await asyncio.sleep(seconds)
    return (sum(map(cpu_s, watched)) - before) / (time.monotonic() - started)


def cpu_s(pid: int) -> float:
    """CPU seconds that a process's threads have used so far, to the nanosecond; 0 if there is no such process."""
    total_ns = 0
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            total_ns += int((task / "schedstat").read_text().split()[0])
    return total_ns / 1e9


def normal(text: str) -> str:
    """Text with its white space normalised."""
    return " ".join(text.split())

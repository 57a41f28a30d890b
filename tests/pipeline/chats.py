"""Chat bodies and answers of the tests that compare the pipeline with plain vLLM."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Callable
from typing import Any

import httpx
from PIL import Image, ImageDraw

from epd.builtin import MODEL_NAME, demo_image_path


def png(image: Image.Image) -> str:
    """A picture as a data URL."""
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def demo() -> Image.Image:
    """The built-in picture."""
    return Image.open(demo_image_path()).convert("RGB")


def scribble(seed: int, size: tuple[int, int] = (256, 128)) -> Image.Image:
    """Some picture, always the same for a seed; no patch of it is like any other, of this or another seed."""
    noise = Image.frombytes("L", size, random.Random(seed).randbytes(size[0] * size[1])).point(lambda v: 200 + v // 6)
    image = Image.merge("RGB", [Image.new("L", size, 240), Image.new("L", size, 250), noise])
    draw = ImageDraw.Draw(image)
    for i in range(6):
        x, y = (seed * 37 + i * 53) % size[0], (seed * 91 + i * 29) % size[1]
        draw.ellipse((x - 20, y - 12, x + 20, y + 12), outline=(10 * i, 20, seed * 7 % 90), width=4)
    return image


def chat(question: str, images: list[Image.Image] = (), **more: Any) -> dict[str, Any]:
    """A greedy chat request that also asks for the token ids."""
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": png(one)}} for one in images]
    content.append({"type": "text", "text": question})
    return {
        "model": MODEL_NAME,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": 32,
        "return_token_ids": True,
        **more,
    }


def ask(client: httpx.Client, body: dict[str, Any]) -> dict[str, Any]:
    """The answer to a chat, which must be one."""
    reply = client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def tokens(answer: dict[str, Any]) -> list[tuple[list[int], str, str]]:
    """Token ids, text and finish reason of each choice."""
    return [(one["token_ids"], one["message"]["content"], one["finish_reason"]) for one in answer["choices"]]


def stream(
    client: httpx.Client, body: dict[str, Any], seen: Callable[[int], object] = lambda count: None
) -> tuple[str, list[int], list[str]]:
    """The text, the token ids and the finish reasons of a streamed chat of one choice.

    `seen` is told how many tokens there are after each chunk.
    """
    text, ids, reasons = "", [], []
    with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as reply:
        assert reply.status_code == 200, reply.read()
        for line in reply.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
                ids += choice.get("token_ids") or []
                reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
            seen(len(ids))
    return text, ids, reasons

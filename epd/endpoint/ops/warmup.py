"""The first requests, sent by the endpoint itself, so that what is slow once is done before anybody waits for it.

Lives in the endpoint process; owns nothing. The requests go the whole way, through the endpoint's own port: HTTP, chat
template, processor, encode workers, and the handshake of prefill and decode workers, which takes the longest.
"""

from __future__ import annotations

import asyncio
import base64
import io
import random
import time

import aiohttp
import structlog
from PIL import Image

log = structlog.get_logger()

TIMEOUT_S = 60.0
MAX_REQUESTS = 8
_SIZE = (256, 256)


async def warm_up(url: str, model: str, api_key: str, num_requests: int) -> None:
    """Sends up to `MAX_REQUESTS` chats at once, so that every prefill and decode worker gets one; never raises.

    Args:
        url: the endpoint's own address.
        model: the name it serves.
        api_key: a valid key, or nothing if it asks for none.
        num_requests: how many.
    """
    started = time.monotonic()
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(url, headers=headers, timeout=timeout) as session:
        asks = [_ask(session, model, seed) for seed in range(min(num_requests, MAX_REQUESTS))]
        statuses = await asyncio.gather(*asks, return_exceptions=True)
    seconds = round(time.monotonic() - started, 2)
    if all(status == 200 for status in statuses):
        log.info("warm", seconds=seconds)
    else:
        log.warning("not warm: the first requests failed", answers=[str(status) for status in statuses])


async def _ask(session: aiohttp.ClientSession, model: str, seed: int) -> int:
    """Asks about a picture, or without one if the model takes none; returns the HTTP status."""
    status = await _post(session, model, [_picture(seed), _TEXT])
    return status if status not in (400, 422) else await _post(session, model, [_TEXT])


_TEXT: dict[str, object] = {"type": "text", "text": "What is in the picture?"}


async def _post(session: aiohttp.ClientSession, model: str, content: list[dict[str, object]]) -> int:
    body = {"model": model, "messages": [{"role": "user", "content": content}], "max_tokens": 2, "stream": True}
    async with session.post("/v1/chat/completions", json=body) as reply:
        await reply.read()
        return reply.status


def _picture(seed: int) -> dict[str, object]:
    pixels = random.Random(seed).randbytes(3 * _SIZE[0] * _SIZE[1])
    file = io.BytesIO()
    Image.frombytes("RGB", _SIZE, pixels).save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}

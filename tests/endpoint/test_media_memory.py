"""Memory by many allowed pictures: bounded for one request and for all, and given back."""

import asyncio
import io
import json
from pathlib import Path

import pytest
import pytest_asyncio
from PIL import Image

from .fake_broker import says
from .serving import chat_body, image_url, serving, with_picture

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]
SIDE = 4000
PICTURE_BYTES = 3 * SIDE * SIDE
MIB = 1 << 20


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory):
    bounds = {"max_request_decoded_bytes": 4 * PICTURE_BYTES, "max_total_decoded_bytes": 5 * PICTURE_BYTES}
    async with serving(tmp_path_factory.mktemp("endpoint"), script=says([100]), **bounds) as served:
        yield served


def rss():
    """What this process has in memory, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) << 10


def pictures(count, shade):
    """Large pictures of little data, and a question."""
    parts = []
    for i in range(count):
        file = io.BytesIO()
        Image.new("RGB", (SIDE, SIDE), (shade, 250, i)).save(file, "PNG")
        parts += with_picture("", image_url(file.getvalue()))
    return [*parts, {"type": "text", "text": "?"}]


async def ask(served, content):
    answer, text = await served.post("/v1/chat/completions", chat_body(content))
    return answer.status, text


async def watch(served, seen):
    """Notes what the endpoint says that it holds, and what this process takes."""
    while True:
        told = json.loads((await served.get("/debug/held"))[1])["daemons"]["endpoint-0"]
        seen.append((told["decoded_media_bytes"], rss()))
        await asyncio.sleep(0.02)


async def test_requests_together_stay_within_the_bound_and_give_all_back(served):
    contents = await asyncio.to_thread(lambda: [pictures(4, shade) for shade in range(10, 14)])
    assert (await ask(served, contents.pop()))[0] == 200  # what is loaded once is loaded now
    before, seen = rss(), []
    watcher = asyncio.create_task(watch(served, seen))
    answers = await asyncio.gather(*(ask(served, each) for each in contents))
    watcher.cancel()
    assert [status for status, _ in answers] == [200] * 3
    counted, taken = max(each for each, _ in seen), max(each for _, each in seen)
    print(f"before {before // MIB} MiB, peak {taken // MIB}, after {rss() // MIB}; counted {counted // MIB}")
    # Who began first may always go on: five pictures for all, and what it lacks of its four.
    assert 4 * PICTURE_BYTES <= counted <= 9 * PICTURE_BYTES
    assert taken - before < 6 * 5 * PICTURE_BYTES  # the processor makes copies of what it is given
    assert rss() - before < 100 * MIB
    assert json.loads((await served.get("/debug/held"))[1])["daemons"]["endpoint-0"]["decoded_media_bytes"] == 0


async def test_a_request_with_more_is_refused_before_anything_is_decoded(served):
    content, before = await asyncio.to_thread(pictures, 5, 99), rss()
    status, text = await ask(served, content)
    assert status == 400 and json.loads(text)["error"]["type"] == "media_too_large"
    assert rss() - before < PICTURE_BYTES


async def test_pictures_that_are_known_count_for_the_request_and_take_nothing(served):
    content = await asyncio.to_thread(pictures, 4, 10)
    assert (await ask(served, content))[0] == 200
    seen = []
    watcher = asyncio.create_task(watch(served, seen))
    assert (await ask(served, content))[0] == 200
    watcher.cancel()
    assert max(each for each, _ in seen) == 0
    assert (await ask(served, [content[0], *content]))[0] == 400

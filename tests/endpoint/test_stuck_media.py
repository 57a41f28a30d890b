"""Media that take too long: 400 for their own request after the deadline, and nobody else waits any longer."""

import asyncio
import json
import threading
import time

import pytest
import pytest_asyncio

from .fake_broker import says
from .serving import chat_body, image_url, serving, until, with_picture
from .test_limits import picture

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]
TIMEOUT_S = 1.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("endpoint")
    async with serving(folder, script=says([100]), media_timeout_s=TIMEOUT_S) as served:
        yield served


@pytest.fixture
def let_go():
    """What a stuck call waits for."""
    event = threading.Event()
    yield event
    event.set()


def fresh(shade):
    return with_picture(url=image_url(picture(size=(64, 64 + shade))))


async def ask(served, content):
    """The status, the type of an error, and after how many seconds."""
    started = time.monotonic()
    answer, text = await served.post("/v1/chat/completions", chat_body(content))
    kind = json.loads(text).get("error", {}).get("type")
    return answer.status, kind, time.monotonic() - started


async def held(served):
    """What the endpoint says that it holds."""
    told = json.loads((await served.get("/debug/held"))[1])
    return told["daemons"]["endpoint-0"]


async def stuck(served, first, others):
    """One request whose media do not end, and others that come a little later."""
    one = asyncio.create_task(ask(served, first))
    await asyncio.sleep(0.2)
    rest = [asyncio.create_task(ask(served, each)) for each in others]
    status, kind, took_s = await one
    assert (status, kind) == (400, "media_timeout") and TIMEOUT_S <= took_s < TIMEOUT_S + 2
    for each in rest:
        status, kind, took_s = await each
        assert status == 200, kind
        assert took_s < TIMEOUT_S + 2


async def test_a_picture_that_is_never_processed_holds_up_nobody(served, monkeypatch, let_go):
    from vllm.model_executor.models.idefics3 import Idefics3MultiModalProcessor

    hf, slow = Idefics3MultiModalProcessor._call_hf_processor, []

    def processor(self, *args, **kwargs):
        if not slow:
            slow.append(1)
            let_go.wait(60)
        return hf(self, *args, **kwargs)

    monkeypatch.setattr(Idefics3MultiModalProcessor, "_call_hf_processor", processor)
    await stuck(served, fresh(1), [fresh(2), fresh(3), "no picture"])
    assert (await held(served))["stuck_media_threads"] == 1
    let_go.set()
    await until(lambda: is_free(served))


async def test_a_picture_that_is_never_decoded_holds_up_nobody(served, monkeypatch, let_go):
    from epd.endpoint.media.pictures import PictureIO

    decode, slow = PictureIO.decode, []

    def decoder(self, data):
        if not slow:
            slow.append(1)
            let_go.wait(60)
        return decode(self, data)

    monkeypatch.setattr(PictureIO, "decode", decoder)
    await stuck(served, fresh(11), [fresh(12), fresh(13)])
    let_go.set()
    await until(lambda: is_free(served))


async def is_free(served):
    told = await held(served)
    return told["stuck_media_threads"] == 0 and told["decoded_media_bytes"] == 0


async def test_more_than_may_be_stuck_are_asked_to_come_back(served, monkeypatch, let_go):
    from epd.endpoint.media.pictures import PictureIO

    decode = PictureIO.decode
    monkeypatch.setattr(PictureIO, "decode", lambda self, data: let_go.wait(60) and decode(self, data))
    every = [asyncio.create_task(ask(served, fresh(20 + i))) for i in range(24)]
    found = [await each for each in every]
    assert {status for status, _, _ in found} == {400, 503} and max(took_s for _, _, took_s in found) < 6
    status, kind, _ = await ask(served, fresh(50))
    assert (status, kind) == (503, "overloaded")
    assert (await ask(served, "text only"))[0] == 200
    let_go.set()
    monkeypatch.setattr(PictureIO, "decode", decode)
    await until(lambda: is_free(served))
    assert (await ask(served, fresh(51)))[0] == 200

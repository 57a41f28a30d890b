"""What the endpoint holds comes back to the idle baseline, whatever its clients do."""

import asyncio
import json

import aiohttp
import pytest
import pytest_asyncio

from .fake_broker import fails, never, says
from .serving import chat_body, serving, until, with_picture
from .uploading import media, picture, state, upload

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory):
    async with serving(tmp_path_factory.mktemp("endpoint"), drain_s=1.0, media_ttl_s=2.0) as served:
        served.kept = []
        yield served


async def held(served):
    _, text = await served.get("/debug/held")
    return json.loads(text)["daemons"]


async def test_all_daemons_are_named(served):
    told = await held(served)
    assert list(told) == ["endpoint-0", "broker", "encode-0", "prefill-1", "decode-2", "cache"]
    assert told["endpoint-0"]["tasks"] > 0 and told["endpoint-0"]["fds"] > 0 and told["endpoint-0"]["threads"] > 0
    _, text = await served.get("/metrics")
    assert 'epd_held{daemon="endpoint-0",kind="requests"} 0.0' in text


async def test_after_answers_failures_cancels_and_a_lost_broker_all_is_as_before(served):
    async def mixed(broker, submit, frames):
        number = int(submit.request_id.removeprefix("chatcmpl-").split("-")[0])
        kinds = (says([100, 101], delay_s=0.01), never, fails(code="worker_lost", message="gone", status=502))
        await kinds[number % 3](broker, submit, frames)

    async def ask(number, **fields):
        headers = {"X-Request-Id": str(number)}
        await served.post("/v1/chat/completions", chat_body(**fields), headers=headers)

    served.broker.script = says([100])
    await served.chat(content=with_picture())  # what is made once is made
    await served.idle()
    before = (await held(served))["endpoint-0"]
    told = await upload(served, picture())
    await state(served, told["id"], "ready")
    served.broker.script = mixed
    contents = ("Read.", with_picture(), media(told["id"]))
    asks = [
        asyncio.create_task(ask(number, content=contents[number % 2 * (1 + number % 4 // 2)], stream=number % 2 == 0))
        for number in range(24)
    ]
    await until(lambda: len(served.broker.submits) >= 24)
    during = (await held(served))["endpoint-0"]
    assert during["requests"] > 0 and during["request_bytes"] > 0 and during["uploads"] == 1
    await asyncio.sleep(0.2)
    for number in range(1, 13, 3):
        await served.post(f"/v1/requests/chatcmpl-{number}/cancel", {})
    await served.broker.die()
    await served.unready()
    served.broker.script = says([100])
    for number in range(13, 19, 3):
        asks[number].cancel()
    served.broker.live()
    await asyncio.gather(*asks, return_exceptions=True)

    await served.idle()
    now = {}

    async def as_before():
        async with aiohttp.ClientSession(served.session._base_url) as one:  # and no connection that is kept open
            await served.session._connector.close()
            async with one.get("/debug/held") as answer:
                now.update((await answer.json())["daemons"]["endpoint-0"])
        # The pool of threads grows to its bound and stays.
        return all(now[kind] <= before[kind] for kind in before if kind != "threads")

    try:
        await until(as_before)
    except TimeoutError:
        pytest.fail(f"{before} became {now}")

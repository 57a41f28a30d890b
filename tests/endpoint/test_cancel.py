"""Requests that nobody wants any more: cancelled by their client's word or absence, in every state they may be in."""

import asyncio
import json

import pytest
import pytest_asyncio

from .fake_broker import never, says
from .serving import chat_body, events, serving, until
from .uploading import KEYS, key

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory):
    async with serving(tmp_path_factory.mktemp("endpoint"), api_keys=KEYS, drain_s=1.0) as served:
        yield served


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def nothing_is_left(served):
    served.broker.script = never
    served.broker.submits.clear()
    served.broker.cancels.clear()
    yield
    await served.idle()


async def cancel(served, request_id, status=200, **options):
    async with served.session.post(f"/v1/requests/{request_id}/cancel", **options) as answer:
        assert answer.status == status, await answer.text()
        return await answer.json()


async def known(served, request_id):
    return (await served.get(f"/v1/requests/{request_id}"))[0].status == 200


def ask(served, name, path="/v1/chat/completions", **body):
    return asyncio.create_task(served.post(path, chat_body() | body, headers={"X-Request-Id": name}))


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_is_cancelled_by_the_id_in_its_answer(served, stream):
    asked = ask(served, f"early-{stream}", stream=stream)
    await until(lambda: served.broker.submits)
    told = await cancel(served, f"chatcmpl-early-{stream}")
    assert told == {"id": f"chatcmpl-early-{stream}", "cancelled": 1}
    answer, text = await asked
    assert answer.status == 499 and json.loads(text)["error"]["type"] == "cancelled"
    assert "Retry-After" not in answer.headers
    await until(lambda: served.broker.cancels)
    assert [each.request_id for each in served.broker.cancels] == [served.broker.submits[0].request_id]
    assert (await cancel(served, f"chatcmpl-early-{stream}"))["cancelled"] == 0, "it has ended"
    assert len(served.broker.cancels) == 1
    _, text = await served.get(f"/v1/requests/chatcmpl-early-{stream}")
    assert json.loads(text)["state"] == "cancelled"


async def test_a_stream_that_has_begun_ends_with_an_error_event(served):
    served.broker.script = says([100] * 1000, delay_s=0.02)
    async with served.session.post("/v1/chat/completions", json=chat_body(stream=True, max_tokens=1000)) as answer:
        line = await answer.content.readline()
        client_id = json.loads(line.removeprefix(b"data: "))["id"]
        assert (await cancel(served, client_id))["cancelled"] == 1
        text = await answer.text()
    (error,) = [event["error"] for event in events(text) if "error" in event]
    assert (error["type"], error["code"]) == ("cancelled", 499)


async def test_all_choices_and_all_prompts_of_a_request_are_cancelled(served):
    asked = ask(served, "many", n=3)
    await until(lambda: len(served.broker.submits) == 3)
    assert (await cancel(served, "chatcmpl-many"))["cancelled"] == 3
    assert (await asked)[0].status == 499
    await until(lambda: len(served.broker.cancels) == 3)
    served.broker.submits.clear()
    served.broker.cancels.clear()
    headers = {"X-Request-Id": "prompts"}
    body = {"model": "digits", "prompt": ["one", "two"], "max_tokens": 4}
    asked = asyncio.create_task(served.post("/v1/completions", body, headers=headers))
    await until(lambda: len(served.broker.submits) == 2)
    assert (await cancel(served, "cmpl-prompts"))["cancelled"] == 2
    assert (await asked)[0].status == 499
    ids = {each.request_id for each in served.broker.submits}
    await until(lambda: {each.request_id for each in served.broker.cancels} == ids)


async def test_only_the_key_that_made_a_request_may_cancel_it(served):
    asked = ask(served, "mine")
    await until(lambda: served.broker.submits)
    await cancel(served, "chatcmpl-mine", status=404, **key(1))
    await cancel(served, "chatcmpl-mine", status=401, headers={"Authorization": "Bearer wrong"})
    await cancel(served, "chatcmpl-nobodys", status=404)
    assert not asked.done() and not served.broker.cancels
    assert (await cancel(served, "chatcmpl-mine", **key(0)))["cancelled"] == 1
    await asked


async def test_requests_of_a_key_share_a_tenant_that_does_not_tell_the_key(served):
    served.broker.script = says([100])
    for options in (key(0), key(0), key(1)):
        await served.post("/v1/chat/completions", chat_body(), **options)
    first, second, third = (each.tenant for each in served.broker.submits)
    assert first == second != third and len(first) == 16
    assert KEYS[0] not in first


async def test_a_request_that_waits_for_the_broker_can_be_cancelled(served):
    await served.broker.die()
    await served.unready()
    asked = ask(served, "waiting")
    try:
        await until(lambda: known(served, "chatcmpl-waiting"))
        assert (await cancel(served, "chatcmpl-waiting"))["cancelled"] == 1
        assert (await asked)[0].status == 499
    finally:
        served.broker.live()
        await served.ready()
    assert not served.broker.submits


async def test_without_keys_the_tenant_is_the_salt(tmp_path):
    async with serving(tmp_path) as other:
        other.broker.script = says([100])
        await other.chat(cache_salt="theirs")
        await other.post("/v1/chat/completions", chat_body(), headers={"Authorization": "Bearer whatever"})
        assert [each.tenant for each in other.broker.submits] == ["theirs", ""]

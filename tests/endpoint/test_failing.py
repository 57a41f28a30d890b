"""Failures on the way: each reaches its client as a status or an explicit error event, and leaves nothing behind."""

import json

import pytest
import pytest_asyncio

from epd.messages import Failed, RequestOutput

from .fake_broker import STORY, fails, never, output, says
from .serving import chat_body, events, serving, until, with_picture

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]
LOST = {"code": "worker_lost", "message": "decode-0 died", "status": 502}
BUSY = {"code": "overloaded", "message": "the queue is full", "status": 503, "retry_after_s": 3.0}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory):
    async with serving(tmp_path_factory.mktemp("endpoint"), drain_s=1.0) as served:
        yield served


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def nothing_is_left(served):
    served.broker.script = says([100])
    served.broker.submits.clear()
    served.broker.cancels.clear()
    yield
    await served.idle()


ASKED = {
    "/v1/chat/completions": chat_body(),
    "/v1/completions": {"model": "digits", "prompt": "hi", "max_tokens": 4},
    "/v1/responses": {"model": "digits", "input": "hi"},
    "/v1/messages": {"model": "digits", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]},
}


@pytest.mark.parametrize("path", ASKED)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_failure_before_the_first_token_is_its_status(served, path, stream):
    served.broker.script = fails(**BUSY)
    answer, text = await served.post(path, ASKED[path] | {"stream": stream})
    if path == "/v1/responses" and stream:  # its first events come before any token
        assert answer.status == 200 and "event: error" in text
        assert events(text)[-1]["code"] == "overloaded"
        return
    assert answer.status == 503, text
    assert answer.headers["Retry-After"] == "3" and answer.content_type == "application/json"
    error = json.loads(text)["error"]
    assert error["type"] == "overloaded" and error["message"] == "the queue is full"


@pytest.mark.parametrize("path", ASKED)
async def test_a_failure_in_a_stream_that_has_begun_is_an_error_event(served, path):
    served.broker.script = fails(after=[100], **LOST)
    answer, text = await served.post(path, ASKED[path] | {"stream": True})
    assert answer.status == 200
    last = [each for each in events(text) if each != "[DONE]"][-1]
    assert "decode-0 died" in json.dumps(last) and "worker_lost" in json.dumps(last)
    assert last.get("type") == "error" or "error" in last


@pytest.mark.parametrize("path", ASKED)
async def test_a_failure_after_some_tokens_of_a_plain_answer_is_its_status(served, path):
    served.broker.script = fails(after=[100, 101], **LOST)
    answer, text = await served.post(path, ASKED[path])
    assert answer.status == 502 and json.loads(text)["error"]["type"] == "worker_lost"


async def test_an_invalid_status_becomes_500(served):
    served.broker.script = fails(code="odd", message="?", status=777)
    answer, _ = await served.chat()
    assert answer.status == 500


async def test_a_failed_child_fails_the_whole_and_cancels_its_siblings(served):
    async def script(broker, submit, _frames):
        if submit.request_id.startswith("1_"):
            await broker.send(Failed(request_id=submit.request_id, **LOST, story=STORY))

    served.broker.script = script
    answer, _ = await served.chat(content=with_picture(), n=3)
    assert answer.status == 502
    others = {submit.request_id for submit in served.broker.submits if not submit.request_id.startswith("1_")}
    await until(lambda: {cancel.request_id for cancel in served.broker.cancels} == others)


async def test_a_failed_prompt_of_several_fails_the_whole(served):
    async def script(broker, submit, frames):
        await (never if "-0-" in submit.request_id else fails(**LOST))(broker, submit, frames)

    served.broker.script = script
    asked = {"model": "digits", "prompt": ["a", "b"], "max_tokens": 4}
    answer, _ = await served.post("/v1/completions", asked)
    assert answer.status == 502
    await until(lambda: len(served.broker.cancels) == 1)


async def test_the_story_of_a_failed_request(served):
    served.broker.script = fails(**LOST)
    headers = {"X-Request-Id": "mine"}
    answer, _ = await served.post("/v1/chat/completions", chat_body(), headers=headers)
    assert answer.status == 502
    _, text = await served.get("/v1/requests/chatcmpl-mine")
    told = json.loads(text)
    assert told["state"] == "failed" and told["requests"][0]["detail"] == "worker_lost: decode-0 died"
    assert len(told["events"]) == 2


@pytest.mark.parametrize("kind", ["garbage", "unfinished"])
async def test_an_output_that_cannot_be_read_fails_its_request_only(served, kind):
    async def script(broker, submit, frames):
        bad = [b"\xc1garbage"] if kind == "garbage" else output(submit.request_id, [100])
        last = RequestOutput(request_id=submit.request_id, token_ids=[7], finish_reason="length")
        await broker.send(last, bad)

    served.broker.script = script
    answer, body = await served.chat()
    assert answer.status == 500 and body["error"]["type"] == "engine_failed"
    served.broker.script = says([100])
    assert (await served.chat())[0].status == 200


async def test_messages_for_unknown_requests_hurt_nobody(served):
    await served.broker.send(RequestOutput(request_id="nobody", token_ids=[7]), output("nobody", [1]))
    await served.broker.send(Failed(request_id="nobody", **LOST))
    assert (await served.chat())[0].status == 200

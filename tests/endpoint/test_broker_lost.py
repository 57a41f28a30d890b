"""The broker goes and comes back: no request is lost, no token lost or repeated, and no wait is without bound."""

import asyncio
import json

import pytest
import pytest_asyncio

from epd.messages import Failed, RequestOutput

from .fake_broker import STORY, never, output, says
from .serving import MODEL, chat_body, events, serving, until, with_picture
from .uploading import media, picture, state, upload

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]
WAIT_S = 3.0
ALL = list(range(100, 112))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("endpoint")
    async with serving(folder, broker_wait_s=WAIT_S, max_waiting=3, drain_s=1.0) as served:
        served.kept = []
        yield served


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def broker(served):
    broker = served.broker
    broker.script = goes_on()
    for each in (broker.submits, broker.cancels, broker.uploads):
        each.clear()
    yield broker
    broker.live()
    await served.ready()
    await served.idle()


def goes_on(num_first=3, then=asyncio.sleep):
    """A script: the first tokens of `ALL`, and the rest for a request that has been sent again."""

    async def script(broker, submit, frames):
        start = len(submit.output_token_ids)
        if submit.attempts:
            await says(ALL[start:])(broker, submit, frames)
            return
        for token in ALL[start : start + num_first]:
            await broker.send(
                RequestOutput(request_id=submit.request_id, token_ids=[7]), output(submit.request_id, [token])
            )

    return script


async def begun(session, body):
    """A stream that has given the first tokens, and those."""
    answer = await session.post("/v1/chat/completions", json=body)
    text = b""
    while text.count(b'"content":"') < 1:
        text += await answer.content.readany()
    return answer, text


def text_of(raw):
    return "".join(event["choices"][0]["delta"].get("content") or "" for event in events(raw) if event != "[DONE]")


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_goes_on_with_the_next_broker_where_it_was(served, broker, tokenizer, stream):
    asked = asyncio.create_task(
        served.post("/v1/chat/completions", chat_body(with_picture(), stream=stream, temperature=0))
    )
    await until(lambda: broker.submits)
    await asyncio.sleep(0.2)
    await broker.die()
    answer, told = await served.unready()
    assert json.loads(told)["missing"] == ["no registration with the broker"]
    assert not asked.done()
    broker.live()
    answer, text = await asked
    assert answer.status == 200 and "broker_lost" not in text
    content = text_of(text) if stream else json.loads(text)["choices"][0]["message"]["content"]
    assert content == tokenizer.decode(ALL)
    first, second = broker.submits
    assert second.request_id == first.request_id
    assert (first.attempts, second.attempts) == (0, 1)
    assert (first.output_token_ids, second.output_token_ids) == ([], ALL[:3])
    assert first.resumable and second.resumable and 0 < second.deadline_s < first.deadline_s
    assert [patch.patch_hash for patch in second.patches] == [patch.patch_hash for patch in first.patches]
    assert all(patch.num_frames for patch in second.patches), "the next broker's index is empty"
    assert second.num_engine_frames == first.num_engine_frames


async def test_several_brokers_may_die_during_one_request(served, broker, tokenizer):
    async def script(broker, submit, frames):
        start = len(submit.output_token_ids)
        if submit.attempts == 3:
            await says(ALL[start:])(broker, submit, frames)
        else:
            token = ALL[start]
            await broker.send(
                RequestOutput(request_id=submit.request_id, token_ids=[7]), output(submit.request_id, [token])
            )

    broker.script = script
    asked = asyncio.create_task(served.chat(temperature=0))
    for attempt in range(3):
        await until(lambda attempt=attempt: len(broker.submits) == attempt + 1)
        await asyncio.sleep(0.1)
        await broker.die()
        await served.unready()
        broker.live()
    answer, body = await asked
    assert answer.status == 200 and body["choices"][0]["message"]["content"] == tokenizer.decode(ALL)
    assert [each.output_token_ids for each in broker.submits] == [ALL[:n] for n in range(4)]


async def test_each_of_several_choices_goes_on_by_itself(served, broker, tokenizer):
    asked = asyncio.create_task(served.chat(n=3, temperature=0.5))
    await until(lambda: len(broker.submits) == 3)
    await asyncio.sleep(0.2)
    await broker.die()
    await served.unready()
    broker.live()
    answer, body = await asked
    assert answer.status == 200
    assert [choice["message"]["content"] for choice in body["choices"]] == [tokenizer.decode(ALL)] * 3


async def test_prompt_logprobs_come_once(served, broker):
    import torch
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.outputs import LogprobsTensors
    from vllm.v1.serial_utils import MsgpackDecoder

    async def script(broker, submit, frames):
        if not submit.attempts:
            rows = submit.num_prompt_tokens - 1
            ids = torch.full((rows, 2), 100, dtype=torch.int64)
            tensors = LogprobsTensors(ids, torch.full((rows, 2), -1.0), torch.ones(rows, dtype=torch.int64))
            part = output(submit.request_id, [], new_prompt_logprobs_tensors=tensors)
            await broker.send(RequestOutput(request_id=submit.request_id, token_ids=[]), part)
        await goes_on()(broker, submit, frames)

    broker.script = script
    body = {"model": "digits", "prompt": "Read the grid.", "max_tokens": 16, "prompt_logprobs": 1, "temperature": 0}
    asked = asyncio.create_task(served.post("/v1/completions", body))
    await until(lambda: broker.submits)
    await asyncio.sleep(0.2)
    await broker.die()
    await served.unready()
    broker.live()
    answer, text = await asked
    assert answer.status == 200, text
    assert len(json.loads(text)["choices"][0]["prompt_logprobs"]) == broker.submits[0].num_prompt_tokens
    again = broker.frames[broker.submits[1].request_id][: broker.submits[1].num_engine_frames]
    params = MsgpackDecoder(EngineCoreRequest).decode(again).sampling_params
    assert isinstance(params, SamplingParams) and params.prompt_logprobs is None, "nobody waits for them again"


@pytest.mark.parametrize("wrong", [{"seed": 3, "temperature": 0.5}, {"presence_penalty": 0.5, "temperature": 0}])
async def test_a_request_that_cannot_go_on_fails_at_once_and_says_so(served, broker, wrong):
    answer, _ = await begun(served.session, chat_body(stream=True, **wrong))
    await broker.die()
    text = await asyncio.wait_for(answer.text(), WAIT_S / 2)
    (error,) = [event["error"] for event in events(text) if "error" in event]
    assert error["type"] == "broker_lost"
    assert len(broker.submits) == 1 and not broker.submits[0].resumable


async def test_a_request_that_cannot_go_on_but_has_no_tokens_is_sent_again(served, broker):
    broker.script = never
    asked = asyncio.create_task(served.chat(seed=3, temperature=0.5))
    await until(lambda: broker.submits)
    await broker.die()
    await served.unready()
    broker.script = says(ALL)
    broker.live()
    answer, _ = await asked
    assert answer.status == 200 and [each.attempts for each in broker.submits] == [0, 1]


async def test_new_requests_wait_for_the_broker(served, broker):
    await broker.die()
    await served.unready()
    asked = asyncio.create_task(served.chat())
    await asyncio.sleep(0.2)
    assert not asked.done() and not broker.submits
    broker.script = says(ALL)
    broker.live()
    assert (await asked)[0].status == 200
    assert [each.attempts for each in broker.submits] == [0]


async def test_all_waits_for_a_broker_end(served, broker):
    broker.script = never
    before = asyncio.create_task(served.chat())
    await until(lambda: broker.submits)
    await broker.die()
    await served.unready()
    asks = [asyncio.create_task(served.chat()) for _ in range(5)]
    done, _ = await asyncio.wait(asks, timeout=WAIT_S / 3)
    assert len(done) == 3, "more than `max_waiting` are refused at once: one was in flight, two are new"
    for each in (*asks, before):
        answer, body = await each
        wanted = "broker_lost" if each is before else "not_ready"
        assert answer.status == 503 and body["error"]["type"] == wanted and answer.headers["Retry-After"]
    assert (await served.get("/health"))[0].status == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_while_its_request_waits_leaves_nothing(served, broker, stream):
    await broker.die()
    await served.unready()
    asked = asyncio.create_task(served.post("/v1/chat/completions", chat_body(stream=stream)))
    await until(lambda: _in_flight(served, 1))
    asked.cancel()
    await served.idle()
    broker.live()
    await served.ready()
    assert not broker.submits


async def _in_flight(served, count):
    return f"epd_requests_in_flight {float(count)}" in (await served.get("/metrics"))[1]


async def test_uploads_and_requests_reach_the_next_broker(served, broker):
    told = await upload(served, picture())
    await state(served, told["id"], "ready")
    broker.script = never
    asked = asyncio.create_task(served.chat(content=media(told["id"])))
    await until(lambda: broker.submits)
    assert not any(patch.num_frames for patch in broker.submits[0].patches)
    await broker.die()
    await served.unready()
    broker.script = says(ALL)
    broker.live()
    assert (await asked)[0].status == 200
    assert all(patch.num_frames for patch in broker.submits[1].patches)
    assert len(broker.uploads) == 2 and all(patch.num_frames for patch in broker.uploads[1].patches)
    await state(served, told["id"], "ready")


async def test_what_an_earlier_broker_says_late_changes_nothing(served, broker):
    asked = asyncio.create_task(served.chat(temperature=0))
    await until(lambda: broker.submits)
    await asyncio.sleep(0.1)
    earlier, request_id = broker.peer, broker.submits[0].request_id
    await broker.die()
    await served.unready()
    broker.peer = earlier
    await broker.send(Failed(request_id=request_id, code="worker_lost", message="late", status=502))
    last = RequestOutput(request_id=request_id, token_ids=[7], finish_reason="length", story=STORY)
    await broker.send(last, output(request_id, [99], "length"))
    broker.live()
    answer, body = await asked
    assert answer.status == 200 and body["usage"]["completion_tokens"] == len(ALL)


async def test_requests_beyond_what_may_be_held_run_but_cannot_be_sent_again(tmp_path):
    async with serving(tmp_path, broker_wait_s=WAIT_S, max_held_bytes=1) as other:
        other.broker.script = goes_on()
        answer, _ = await begun(other.session, chat_body(with_picture(), stream=True, temperature=0))
        await other.broker.die()
        assert "broker_lost" in await asyncio.wait_for(answer.text(), WAIT_S / 2)
        other.broker.live()
        await other.ready()
        other.broker.script = never
        asked = asyncio.create_task(other.chat())
        await until(lambda: len(other.broker.submits) == 2)
        await other.broker.die()
        await other.unready()
        other.broker.script = says(ALL)
        other.broker.live()
        assert (await asked)[0].status == 200, "until its first token it is held"


async def test_without_patience_a_lost_broker_fails_everything(tmp_path):
    async with serving(tmp_path, broker_wait_s=0.0) as other:
        other.broker.script = never
        asked = asyncio.create_task(other.chat())
        await until(lambda: other.broker.submits)
        await other.broker.die()
        answer, body = await asked
        assert answer.status == 503 and body["error"]["type"] == "broker_lost"
        answer, body = await other.chat()
        assert answer.status == 503 and body["error"]["type"] == "not_ready"

"""What users of `vllm serve` do, over the pipeline: every API, streaming, n, stop strings, log-probabilities."""

import asyncio
import json

import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from epd.messages import RequestOutput, Stage

from .fake_broker import ALL_STAGES, STORY, never, output, says
from .serving import MODEL, chat_body, events, serving, until, with_picture

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]
TEXT_TOKENS = [100, 101, 102]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory):
    async with serving(tmp_path_factory.mktemp("endpoint")) as served:
        yield served


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(autouse=True)
def script(served):
    served.broker.script = says(TEXT_TOKENS)
    served.broker.submits.clear()
    served.broker.cancels.clear()
    return served.broker


async def test_a_chat_is_answered_with_the_pipelines_tokens(served, tokenizer):
    answer, body = await served.chat()
    assert answer.status == 200
    assert body["choices"][0]["message"]["content"] == tokenizer.decode(TEXT_TOKENS)
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 3
    (submit,) = served.broker.submits
    assert submit.max_tokens == 16 and not submit.patches
    assert submit.num_prompt_tokens == body["usage"]["prompt_tokens"]


async def test_a_chat_streams_as_tokens_come(served, tokenizer):
    served.broker.script = says(TEXT_TOKENS, delay_s=0.05)
    answer, text = await served.post("/v1/chat/completions", chat_body(stream=True))
    assert answer.content_type == "text/event-stream"
    *chunks, done = events(text)
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"].get("content") for chunk in chunks]
    assert [each for each in deltas if each] == [tokenizer.decode([token]) for token in TEXT_TOKENS]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


async def test_a_picture_is_sent_as_patches_and_never_with_the_engine_request(served):
    from vllm.multimodal.inputs import MultiModalKwargsItem
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.serial_utils import MsgpackDecoder

    answer, body = await served.chat(content=with_picture())
    assert answer.status == 200
    (submit,) = served.broker.submits
    frames = served.broker.frames[submit.request_id]
    assert len(frames) == submit.num_engine_frames + sum(patch.num_frames for patch in submit.patches)
    request = MsgpackDecoder(EngineCoreRequest).decode(frames[: submit.num_engine_frames])
    assert request.request_id == submit.request_id
    assert len(request.prompt_token_ids) == submit.num_prompt_tokens == body["usage"]["prompt_tokens"]
    assert [f.data for f in request.mm_features] == [None] * 9  # a grid of 4 x 2 tiles and the overview
    assert [f.identifier for f in request.mm_features] == [p.patch_hash for p in submit.patches]
    image_token = 4
    for feature, patch in zip(request.mm_features, submit.patches, strict=True):
        place = feature.mm_position
        assert place.length == patch.num_tokens == 4 and patch.modality == "image"
        tokens = request.prompt_token_ids[place.offset : place.offset + place.length]
        assert tokens == [image_token] * 4
    first = frames[submit.num_engine_frames :][: submit.patches[0].num_frames]
    item = MsgpackDecoder(MultiModalKwargsItem).decode(first)
    assert tuple(item["pixel_values"].data.shape) == (1, 3, 64, 64)


async def test_completions_of_several_prompts(served, tokenizer):
    asked = {"model": "digits", "prompt": ["one", "two"], "max_tokens": 4}
    answer, text = await served.post("/v1/completions", asked)
    body = json.loads(text)
    assert answer.status == 200
    assert [choice["text"] for choice in body["choices"]] == [tokenizer.decode(TEXT_TOKENS)] * 2
    _, told = await served.get(f"/v1/requests/{body['id']}")
    assert len(json.loads(told)["requests"]) == 2


async def test_completions_stream(served, tokenizer):
    asked = {"model": "digits", "prompt": "one", "max_tokens": 4, "stream": True}
    _, text = await served.post("/v1/completions", asked)
    *chunks, done = events(text)
    assert done == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == tokenizer.decode(TEXT_TOKENS)


async def test_the_responses_api_answers_and_has_a_story(served, tokenizer):
    answer, text = await served.post("/v1/responses", {"model": "digits", "input": "hi", "max_output_tokens": 4})
    body = json.loads(text)
    assert answer.status == 200, text
    assert body["output"][0]["content"][0]["text"] == tokenizer.decode(TEXT_TOKENS)
    answer, told = await served.get(f"/v1/requests/{body['id']}")
    assert answer.status == 200 and json.loads(told)["state"] == "finished"


async def test_responses_stream_with_a_picture(served):
    url = with_picture()[0]["image_url"]["url"]
    content = [{"type": "input_text", "text": "hi"}, {"type": "input_image", "image_url": url, "detail": "auto"}]
    content += [{"type": "input_text", "text": "Read."}]
    asked = {"model": "digits", "input": [{"role": "user", "content": content}], "stream": True}
    answer, text = await served.post("/v1/responses", asked)
    assert answer.status == 200, text
    assert events(text)[-1]["type"] == "response.completed"
    assert len(served.broker.submits[0].patches) == 9


async def test_the_messages_api_answers_and_streams(served, tokenizer):
    asked = {"model": "digits", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]}
    answer, text = await served.post("/v1/messages", asked)
    assert answer.status == 200, text
    assert json.loads(text)["content"][0]["text"] == tokenizer.decode(TEXT_TOKENS)
    answer, text = await served.post("/v1/messages", asked | {"stream": True})
    assert answer.status == 200 and events(text)[-1]["type"] == "message_stop"


async def test_models_are_listed_and_tokens_are_made_and_undone(served):
    _, text = await served.get("/v1/models")
    (model,) = json.loads(text)["data"]
    assert model["id"] == "digits" and model["max_model_len"] == 1024
    assert model["epd"] == {"units": {"image": "tile"}, "tokens_per_patch": {"image": 4}}
    _, text = await served.post("/tokenize", {"model": "digits", "prompt": "Read the grid."})
    tokens = json.loads(text)["tokens"]
    _, text = await served.post("/detokenize", {"model": "digits", "tokens": tokens})
    assert json.loads(text)["prompt"] == "Read the grid."
    _, text = await served.post("/tokenize", {"model": "digits", **chat_body(with_picture())})
    assert json.loads(text)["count"] > 36
    assert not served.broker.submits


async def test_n_choices_are_requests_of_their_own_that_share_the_patches(served, tokenizer):
    answers = iter([[100, 101], [102, 103, 104]])

    async def script(broker, submit, frames):
        await says(next(answers))(broker, submit, frames)

    served.broker.script = script
    _, body = await served.chat(content=with_picture(), n=2)
    texts = {choice["message"]["content"] for choice in body["choices"]}
    assert texts == {tokenizer.decode([100, 101]), tokenizer.decode([102, 103, 104])}
    first, second = served.broker.submits
    assert first.patches == second.patches and first.request_id != second.request_id
    _, text = await served.get(f"/v1/requests/{body['id']}")
    told = json.loads(text)
    assert {part["request_id"] for part in told["requests"]} == {first.request_id, second.request_id}
    assert told["state"] == "finished" and len(told["events"]) == 4


async def test_a_stop_string_ends_the_answer_and_cancels_the_rest(served, tokenizer):
    async def script(broker, submit, frames):
        for token in (100, 101, 102):
            await broker.send(
                RequestOutput(request_id=submit.request_id, token_ids=[7]), output(submit.request_id, [token])
            )

    served.broker.script = script
    _, body = await served.chat(stop=[tokenizer.decode([102])])
    choice = body["choices"][0]
    assert choice["message"]["content"] == tokenizer.decode([100, 101]) and choice["finish_reason"] == "stop"
    request_id = served.broker.submits[0].request_id
    await asyncio.wait_for(served.broker.cancelled[request_id].wait(), 1)
    assert [(c.request_id, c.reason) for c in served.broker.cancels] == [(request_id, "stop")]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_goes_away_cancels_its_request_within_a_second(served, stream):
    served.broker.script = says([100] * 1000, delay_s=0.05) if stream else never
    asked = asyncio.create_task(served.post("/v1/chat/completions", chat_body(stream=stream)))
    await until(lambda: served.broker.submits)
    asked.cancel()
    request_id = served.broker.submits[0].request_id
    await asyncio.wait_for(served.broker.cancelled[request_id].wait(), 1)
    assert served.broker.cancels[0].reason == "disconnect"
    await asyncio.wait_for(served.idle(), 1)


async def test_logprobs_of_tokens_reach_the_client(served):
    import numpy
    from vllm.v1.outputs import LogprobsLists

    async def script(broker, submit, _frames):
        ids, values = numpy.array([[100, 101, 102]]), numpy.array([[-0.5, -1.0, -2.0]])
        frames = output(
            submit.request_id, [100], "length", new_logprobs=LogprobsLists(ids, values, numpy.array([1]), None)
        )
        finished = RequestOutput(request_id=submit.request_id, token_ids=[7], finish_reason="length", story=STORY)
        await broker.send(finished, frames)

    served.broker.script = script
    _, body = await served.chat(logprobs=True, top_logprobs=2)
    (told,) = body["choices"][0]["logprobs"]["content"]
    assert told["logprob"] == -0.5 and len(told["top_logprobs"]) == 2


@pytest.mark.parametrize("order", ["before", "after"])
async def test_prompt_logprobs_of_the_prefill_worker_come_with_the_first_output(served, order):
    import torch
    from vllm.v1.outputs import LogprobsTensors

    def part(submit, rows, token):
        ids = torch.full((rows, 2), token, dtype=torch.int64)
        tensors = LogprobsTensors(ids, torch.full((rows, 2), -1.0), torch.ones(rows, dtype=torch.int64))
        return output(submit.request_id, [], new_prompt_logprobs_tensors=tensors)

    async def script(broker, submit, frames):
        empty = RequestOutput(request_id=submit.request_id, token_ids=[])
        one = RequestOutput(request_id=submit.request_id, token_ids=[7])
        count = submit.num_prompt_tokens - 1
        if order == "before":  # in two chunks, as chunked prefill gives them
            await broker.send(empty, part(submit, 2, 100))
            await broker.send(empty, part(submit, count - 2, 101))
        await broker.send(one, output(submit.request_id, [100]))
        if order == "after":
            await asyncio.sleep(0.05)
            await broker.send(empty, part(submit, count, 100))
        await says([101])(broker, submit, frames)

    served.broker.script = script
    asked = {"model": "digits", "prompt": "Read the grid.", "max_tokens": 4, "prompt_logprobs": 1}
    answer, text = await served.post("/v1/completions", asked)
    assert answer.status == 200, text
    told = json.loads(text)["choices"][0]["prompt_logprobs"]
    assert told[0] is None and len(told) == served.broker.submits[0].num_prompt_tokens
    assert [list(place) for place in told[1:3]] == [["100"]] * 2
    assert all(place["100" if order == "after" else "101"]["logprob"] == -1.0 for place in told[3:])


async def test_prompt_logprobs_that_never_come_are_an_error_not_a_wrong_answer(served):
    asked = {"model": "digits", "prompt": "Read the grid.", "max_tokens": 4, "prompt_logprobs": 1}
    answer, text = await served.post("/v1/completions", asked)
    assert answer.status == 500 and json.loads(text)["error"]["type"] == "engine_failed"


async def test_the_story_of_a_request_that_is_answered(served):
    _, body = await served.chat()
    answer, text = await served.get(f"/v1/requests/{body['id']}")
    told = json.loads(text)
    assert answer.status == 200 and told["id"] == body["id"] and told["state"] == "finished"
    assert [event["event"] for event in told["events"]] == ["accepted", "finished"]
    assert told["events"][1]["worker"] == "decode-0"


async def test_the_story_of_a_request_in_flight_is_the_brokers(served):
    served.broker.script = says([100] * 20, delay_s=0.1)
    async with served.session.post("/v1/chat/completions", json=chat_body(stream=True)) as answer:
        line = await answer.content.readline()
        client_id = json.loads(line.removeprefix(b"data: "))["id"]
        _, text = await served.get(f"/v1/requests/{client_id}")
    told = json.loads(text)
    assert told["state"] == "in_flight" and [event["event"] for event in told["events"]] == ["accepted"]


async def test_an_unknown_request_has_no_story(served):
    answer, text = await served.get("/v1/requests/chatcmpl-unknown")
    assert answer.status == 404 and json.loads(text)["error"]["code"] == 404


async def test_ready_says_what_is_missing_and_health_does_not_care(served):
    await served.broker.set_workers(Stage.ENCODE, Stage.DECODE)
    answer, text = await served.unready()
    assert answer.status == 503 and json.loads(text)["missing"] == ["no prefill worker"]
    assert answer.headers["Retry-After"]
    assert (await served.get("/health"))[0].status == 200
    await served.broker.set_workers(*ALL_STAGES)
    await asyncio.wait_for(served.ready(), 1)


async def test_the_metrics_are_one_valid_exposition_of_vllms_and_ours(served):
    await served.chat()
    answer, text = await served.get("/metrics")
    assert answer.status == 200 and answer.content_type == "text/plain"
    families = {each.name: each for each in text_string_to_metric_families(text)}
    assert sum(sample.value for sample in families["epd_workers"].samples) == 3
    assert families["epd_broker_accepted"].samples[0].value == 3
    ours = families["vllm:generation_tokens"].samples
    assert next(s.value for s in ours if s.name == "vllm:generation_tokens_total") >= 3
    prefill = families["vllm:request_prefill_time_seconds"].samples
    assert 0 <= next(s.value for s in prefill if s.name.endswith("_sum")) < 60
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names))


async def test_head_options_and_unknown_paths(served):
    async with served.session.options("/v1/models") as answer:
        assert answer.status in (200, 405)
    assert (await served.get("/nowhere"))[0].status == 404
    assert (await served.get("/docs"))[0].status == 200

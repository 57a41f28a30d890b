"""The pipeline's answers are those of one plain vLLM engine with the same model, token for token."""

from __future__ import annotations

import concurrent.futures
import json

import httpx
import pytest
from PIL import Image

from benchmarks.servers import Running
from epd.builtin import DEMO_ANSWER, DEMO_QUESTION, MODEL_NAME
from tests.pipeline.chats import ask, chat, demo, scribble, stream, tokens

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

CASES = {
    "one image": chat(DEMO_QUESTION, [demo()]),
    "several images": chat("How many digits are there?", [demo(), scribble(1), scribble(2, (128, 256))]),
    "an image smaller than a patch": chat("What digits are in the image?", [Image.new("RGB", (20, 12), "navy")]),
    "the same image twice": chat("List the digits.", [demo(), demo()]),
    "text only": chat("How many digits are in the image?"),
    "a long answer": chat("List the digits.", [scribble(3)], max_tokens=200, ignore_eos=True),
    "a penalty": chat(DEMO_QUESTION, [demo()], presence_penalty=1.5, frequency_penalty=0.5, ignore_eos=True),
    "a stop string": chat(DEMO_QUESTION, [demo()], stop=["1"]),
    "a stop string that is kept": chat(DEMO_QUESTION, [demo()], stop=["6\n7"], include_stop_str_in_output=True),
    "one token": chat(DEMO_QUESTION, [demo()], max_tokens=1),
}


@pytest.mark.parametrize("body", CASES.values(), ids=CASES)
def test_greedy_tokens_are_equal(epd: httpx.Client, plain: httpx.Client, body: dict) -> None:
    ours, theirs = ask(epd, body), ask(plain, body)
    assert tokens(ours) == tokens(theirs)
    assert ours["usage"] == theirs["usage"]
    assert ours["prompt_token_ids"] == theirs["prompt_token_ids"]


@pytest.mark.parametrize("body", CASES.values(), ids=CASES)
def test_streamed_tokens_are_equal(epd: httpx.Client, plain: httpx.Client, body: dict) -> None:
    assert stream(epd, body) == stream(plain, body)


def test_the_built_in_model_reads_the_built_in_picture(epd: httpx.Client) -> None:
    [(_, text, reason)] = tokens(ask(epd, chat(DEMO_QUESTION, [demo()])))
    assert text.strip() == DEMO_ANSWER
    assert reason == "stop"


def test_thirty_two_requests_at_once_are_equal(running: Running, plain: httpx.Client) -> None:
    questions = [DEMO_QUESTION, "List the digits.", "How many digits are there?", "Which digit is the largest?"]
    bodies = [chat(questions[i % 4], [scribble(i)] if i % 8 else []) for i in range(32)]
    expected = [tokens(ask(plain, body)) for body in bodies]
    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda body: tokens(ask(running.http, body)), bodies))
    assert found == expected
    running.wait_idle()


def test_sampling_with_n_2_and_a_seed_is_equal(epd: httpx.Client, plain: httpx.Client) -> None:
    body = chat("How many digits are there?", [demo()], n=2, seed=7, temperature=1.0, max_tokens=12)
    ours, theirs = tokens(ask(epd, body)), tokens(ask(plain, body))
    assert ours == theirs
    assert len(ours) == 2
    assert tokens(ask(epd, body)) == ours, "the same seed gives the same answers again"


def test_log_probabilities_are_equal(epd: httpx.Client, plain: httpx.Client) -> None:
    body = chat(DEMO_QUESTION, [demo()], logprobs=True, top_logprobs=4)
    ours, theirs = ask(epd, body), ask(plain, body)
    ours_lines, their_lines = (one["choices"][0]["logprobs"]["content"] for one in (ours, theirs))
    assert [line["token"] for line in ours_lines] == [line["token"] for line in their_lines]
    for our, their in zip(ours_lines, their_lines, strict=True):
        assert our["logprob"] == pytest.approx(their["logprob"], abs=0.03)
        for mine, other in zip(our["top_logprobs"], their["top_logprobs"], strict=True):
            assert mine["logprob"] == pytest.approx(other["logprob"], rel=0.02, abs=0.1)


def test_prompt_log_probabilities_come_from_the_prefill_worker_and_are_equal(
    epd: httpx.Client, plain: httpx.Client
) -> None:
    body = chat(DEMO_QUESTION, [demo()], prompt_logprobs=1, max_tokens=2)
    ours, theirs = ask(epd, body)["prompt_logprobs"], ask(plain, body)["prompt_logprobs"]
    assert len(ours) == len(theirs) > 60
    assert ours[0] is theirs[0] is None
    for our, their in zip(ours[1:], theirs[1:], strict=True):
        common = our.keys() & their.keys()
        assert common
        for token in common:
            assert our[token]["logprob"] == pytest.approx(their[token]["logprob"], rel=0.02, abs=0.1)


def test_an_answer_under_a_json_schema_is_equal_and_fits_the_schema(epd: httpx.Client, plain: httpx.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["count"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "digits", "schema": schema, "strict": True}}
    body = chat("How many digits are there?", [demo()], response_format=form, max_tokens=64)
    assert tokens(ask(epd, body)) == tokens(ask(plain, body))
    # The built-in model loves line feeds, which JSON allows for ever: a bias gets it to the point.
    prompt = {"model": MODEL_NAME, "prompt": '"count":1}', "add_special_tokens": False}
    wanted = epd.post("/tokenize", json=prompt).json()["tokens"]
    body |= {"logit_bias": dict.fromkeys(map(str, wanted), 100)}
    [ours], [theirs] = tokens(ask(epd, body)), tokens(ask(plain, body))
    assert ours == theirs
    assert json.loads(ours[1]).keys() == {"count"}


def test_completions_of_text_are_equal(epd: httpx.Client, plain: httpx.Client) -> None:
    body = {"model": MODEL_NAME, "prompt": "User: What digits", "max_tokens": 16, "temperature": 0, "logprobs": 2}
    ours, theirs = (client.post("/v1/completions", json=body).json() for client in (epd, plain))
    assert ours["choices"][0]["text"] == theirs["choices"][0]["text"]
    assert ours["usage"] == theirs["usage"]


def test_echo_with_log_probabilities_is_equal(epd: httpx.Client, plain: httpx.Client) -> None:
    body = {"model": MODEL_NAME, "prompt": "User: What digits", "max_tokens": 4, "temperature": 0}
    body |= {"logprobs": 1, "echo": True}
    ours, theirs = (client.post("/v1/completions", json=body).json()["choices"][0] for client in (epd, plain))
    assert ours["text"] == theirs["text"]
    assert ours["logprobs"]["tokens"] == theirs["logprobs"]["tokens"]


def test_responses_and_messages_are_equal(epd: httpx.Client, plain: httpx.Client) -> None:
    body = chat(DEMO_QUESTION, [demo()])
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    parts = [{"type": "input_image", "image_url": url, "detail": "auto"}, {"type": "input_text", "text": DEMO_QUESTION}]
    responses = {"model": MODEL_NAME, "input": [{"role": "user", "content": parts}], "temperature": 0}
    responses |= {"max_output_tokens": 32}
    ours, theirs = (client.post("/v1/responses", json=responses) for client in (epd, plain))
    assert ours.status_code == theirs.status_code == 200, (ours.text, theirs.text)
    assert ours.json()["output"][-1]["content"][0]["text"] == theirs.json()["output"][-1]["content"][0]["text"]

    source = {"type": "base64", "media_type": "image/png", "data": url.split(",")[1]}
    content = [{"type": "image", "source": source}, {"type": "text", "text": DEMO_QUESTION}]
    messages = {"model": MODEL_NAME, "messages": [{"role": "user", "content": content}], "max_tokens": 32}
    messages |= {"temperature": 0}
    ours, theirs = (client.post("/v1/messages", json=messages) for client in (epd, plain))
    assert ours.status_code == theirs.status_code == 200, (ours.text, theirs.text)
    assert ours.json()["content"] == theirs.json()["content"]
    assert ours.json()["content"][0]["text"].strip() == DEMO_ANSWER


def test_tokenize_and_models_are_equal(epd: httpx.Client, plain: httpx.Client) -> None:
    body = {"model": MODEL_NAME, "prompt": "What digits are in the image?"}
    ours, theirs = (client.post("/tokenize", json=body).json() for client in (epd, plain))
    assert ours["tokens"] == theirs["tokens"]
    detok = {"model": MODEL_NAME, "tokens": ours["tokens"]}
    assert epd.post("/detokenize", json=detok).json() == plain.post("/detokenize", json=detok).json()
    ids = [[one["id"] for one in client.get("/v1/models").json()["data"]] for client in (epd, plain)]
    assert ids == [[MODEL_NAME], [MODEL_NAME]]

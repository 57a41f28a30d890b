"""Bad input over HTTP, by schemathesis and Hypothesis: no crash, no hang, and no 5xx for what is the client's fault.

`EPD_FUZZ_EXAMPLES` says how many requests each test makes; the default fits into a CI run.
"""

import asyncio
import contextlib
import json
import os
import threading
import urllib.request

import hypothesis.strategies as st
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from epd.messages import RequestOutput

from .fake_broker import output, says
from .serving import chat_body, image_url, serving, with_picture

pytestmark = [pytest.mark.engine, pytest.mark.timeout(3600)]
NUM_EXAMPLES = int(os.environ.get("EPD_FUZZ_EXAMPLES", "2"))
TIMEOUT_S = 30

# What vLLM answers 501 to on purpose, whatever it is sent, and why.
NOT_IMPLEMENTED = {"/v1/systemone": "the model does not support the structured decision api"}

OPERATIONS = [
    ("get", "/debug/held"),
    ("get", "/health"),
    ("get", "/is_scaling_elastic_ep"),
    ("get", "/kv_event_sources"),
    ("get", "/load"),
    ("get", "/metrics"),
    ("get", "/ping"),
    ("get", "/ready"),
    ("get", "/v1/cache"),
    ("get", "/v1/media/{media_id}"),
    ("get", "/v1/models"),
    ("get", "/v1/requests/{request_id}"),
    ("get", "/v1/responses/{response_id}"),
    ("get", "/version"),
    ("delete", "/v1/media/{media_id}"),
    ("post", "/detokenize"),
    ("post", "/generative_scoring"),
    ("post", "/inference/v1/abort_requests"),
    ("post", "/inference/v1/generate"),
    ("post", "/invocations"),
    ("post", "/is_scaling_elastic_ep"),
    ("post", "/ping"),
    ("post", "/scale_elastic_ep"),
    ("post", "/tokenize"),
    ("post", "/v1/chat/completions"),
    ("post", "/v1/chat/completions/batch"),
    ("post", "/v1/chat/completions/derender"),
    ("post", "/v1/chat/completions/render"),
    ("post", "/v1/completions"),
    ("post", "/v1/completions/derender"),
    ("post", "/v1/completions/render"),
    ("post", "/v1/media"),
    ("post", "/v1/messages"),
    ("post", "/v1/messages/count_tokens"),
    ("post", "/v1/messages/render"),
    ("post", "/v1/requests/{request_id}/cancel"),
    ("post", "/v1/responses"),
    ("post", "/v1/responses/render"),
    ("post", "/v1/responses/{response_id}/cancel"),
    ("post", "/v1/systemone"),
]


async def answers(broker, submit, frames):
    """A script: two tokens, and before them the log-probabilities of the prompt where they are asked for."""
    import torch
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.outputs import LogprobsTensors
    from vllm.v1.serial_utils import MsgpackDecoder

    params = MsgpackDecoder(EngineCoreRequest).decode(frames[: submit.num_engine_frames]).sampling_params
    rows = submit.num_prompt_tokens - 1
    if params.prompt_logprobs is not None and rows:
        width = max(params.prompt_logprobs, 0) + 1
        ids = torch.full((rows, width), 100, dtype=torch.int64)
        tensors = LogprobsTensors(ids, torch.full((rows, width), -1.0), torch.ones(rows, dtype=torch.int64))
        part = output(submit.request_id, [], new_prompt_logprobs_tensors=tensors)
        await broker.send(RequestOutput(request_id=submit.request_id, token_ids=[]), part)
    await says([100, 101])(broker, submit, frames)


class Background:
    """The endpoint on a loop in a thread of its own, for clients that block."""

    def __init__(self, folder):
        self._folder = folder
        self._up, self._down = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),))

    def __enter__(self):
        self._thread.start()
        assert self._up.wait(100)
        return self

    def __exit__(self, *_):
        self._loop.call_soon_threadsafe(self._down.set)
        self._thread.join(60)
        assert not self._thread.is_alive()

    async def _serve(self):
        self._loop = asyncio.get_running_loop()
        options = {"max_body_bytes": 1 << 20, "drain_s": 1.0, "serve": {"trust_request_mm_kwargs": True}}
        async with serving(self._folder, script=answers, **options) as served:
            self.url = str(served.session._base_url).rstrip("/")
            self._up.set()
            await self._down.wait()
            await served.idle()


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    with Background(tmp_path_factory.mktemp("endpoint")) as endpoint:
        yield endpoint.url
        assert requests.get(f"{endpoint.url}/health", timeout=TIMEOUT_S).status_code == 200


@pytest.fixture(scope="module")
def schema(url):
    return schemathesis.openapi.from_url(f"{url}/openapi.json")


def fuzz(test):
    """Runs a test on many inputs, the same ones each time unless more are asked for."""
    return settings(
        max_examples=NUM_EXAMPLES,
        deadline=None,
        derandomize="EPD_FUZZ_EXAMPLES" not in os.environ,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )(test)


def check(path, status, text):
    """An answer that a client may get for any input."""
    if status == 501 and NOT_IMPLEMENTED.get(path, "?") in text.lower():
        return
    assert status < 500, (path, status, text[:2000])


def test_the_schema_has_no_other_operations(schema):
    known = {(method, path) for method, path in OPERATIONS}
    found = {(each.ok().method.lower(), each.ok().path) for each in schema.get_all_operations()}
    assert found <= known, "an operation that is not fuzzed below"


@pytest.mark.parametrize("mode", list(GenerationMode), ids=str)
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_input_is_answered_by_a_server_error(url, schema, method, path, mode):
    if path not in set(schema) or method.upper() not in {each.upper() for each in schema[path]}:
        pytest.skip("the schema does not tell of it; bodies of ours are sent there below")

    @fuzz
    @given(case=schema[path][method.upper()].as_strategy(generation_mode=mode))
    def run(case):
        answer = case.call(base_url=url, timeout=TIMEOUT_S)
        check(path, answer.status_code, answer.text)

    with contextlib.suppress(Unsatisfiable):  # nothing can be wrong with a request that has no parameters
        run()


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["", "0", "auto", "json_object", "\x00", "\ud83d", -1, 0, 1, 1e400, 2**31, 2**63, [], {}]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=8,
)
# fmt: off
FIELDS = [
    "messages", "prompt", "input", "system", "max_tokens", "max_completion_tokens", "max_output_tokens",
    "temperature", "top_p", "top_k", "min_p", "n", "seed", "stop", "stop_token_ids", "logprobs", "top_logprobs",
    "prompt_logprobs", "logit_bias", "allowed_token_ids", "bad_words", "min_tokens", "presence_penalty",
    "frequency_penalty", "repetition_penalty", "response_format", "structured_outputs", "tools", "tool_choice",
    "stream", "stream_options", "echo", "suffix", "best_of", "user", "cache_salt", "mm_processor_kwargs",
    "media_io_kwargs", "chat_template", "chat_template_kwargs", "add_generation_prompt", "continue_final_message",
    "documents", "vllm_xargs", "kv_transfer_params", "ec_transfer_params", "request_id", "priority",
    "truncate_prompt_tokens", "length_penalty", "use_beam_search", "ignore_eos", "include_stop_str_in_output",
    "skip_special_tokens", "detokenize", "return_token_ids", "return_tokens_as_token_ids", "reasoning_effort",
    "reasoning", "thinking", "metadata", "store", "background", "previous_response_id", "instructions", "model",
    "thinking_token_budget", "repetition_detection", "prompt_embeds", "trace_decode_token_ids",
    "features", "token_ids", "sampling_params", "request_ids", "multi_modal_data", "images", "audio", "videos", "state",
    "questions", "query", "items", "label_token_ids", "apply_softmax", "return_token_strs", "generate_responses",
]
# fmt: on
BODIES = {
    "/v1/chat/completions": chat_body(),
    "/v1/chat/completions#picture": chat_body(with_picture()),
    "/v1/completions": {"model": "digits", "prompt": "hi", "max_tokens": 4},
    "/v1/responses": {"model": "digits", "input": "hi"},
    "/v1/messages": {"model": "digits", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]},
    "/v1/chat/completions/batch": chat_body() | {"messages": [[{"role": "user", "content": "hi"}]]},
    "/v1/chat/completions/render": chat_body(with_picture()),
    "/v1/completions/render": {"model": "digits", "prompt": "hi", "max_tokens": 4},
    "/v1/responses/render": {"model": "digits", "input": "hi"},
    "/v1/messages/render": {"model": "digits", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]},
    "/v1/messages/count_tokens": {"model": "digits", "messages": [{"role": "user", "content": "hi"}]},
    "/v1/chat/completions/derender": {"model": "digits", "choices": [{"index": 0, "token_ids": [100]}]},
    "/v1/completions/derender": {"model": "digits", "choices": [{"index": 0, "token_ids": [100]}]},
    "/inference/v1/generate": {"model": "digits", "token_ids": [100], "sampling_params": {"max_tokens": 2}},
    "/inference/v1/abort_requests": {"request_ids": ["x"]},
    "/invocations": chat_body(),
    "/generative_scoring": {"model": "digits", "query": "a", "items": ["b"], "label_token_ids": [100, 101]},
    "/v1/systemone": {"model": "digits", "state": "x", "questions": {"q": {"type": "noul"}}},
    "/tokenize": {"model": "digits", "prompt": "hi"},
    "/tokenize#chat": {"model": "digits", "messages": [{"role": "user", "content": with_picture()}]},
    "/detokenize": {"model": "digits", "tokens": [100]},
}


def send(url, path, body, content_type="application/json"):
    answer = requests.post(url + path, data=body, headers={"Content-Type": content_type}, timeout=TIMEOUT_S)
    check(path, answer.status_code, answer.text)
    return answer


@pytest.mark.parametrize("place", BODIES)
def test_a_good_body_with_any_value_in_any_field_is_answered(url, place):
    path = place.partition("#")[0]

    @fuzz
    @given(changes=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3))
    def run(changes):
        send(url, path, json.dumps(BODIES[place] | changes).encode("utf-8", "surrogatepass"))

    run()


PARTS = st.sampled_from(
    ["text", "image_url", "input_image", "video_url", "input_audio", "audio_url", "refusal", "x", "image_pil",
     "image_embeds", "prompt_embeds", "tool_result", "tool_use", "image", "thinking", "tool_reference"]
)  # fmt: skip


@pytest.mark.parametrize("place", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_any_content_parts_are_answered(url, place):
    value = JSON | st.just({"url": image_url()}) | st.just(image_url()) | st.sampled_from(["data:,", "file:///", "x:"])
    part = st.fixed_dictionaries(
        {"type": PARTS}, optional=dict.fromkeys(("text", "image_url", "source", "uuid"), value)
    )

    @fuzz
    @given(parts=st.lists(part | JSON, min_size=1, max_size=3))
    def run(parts):
        message = {"role": "user", "content": parts}
        key = "input" if place == "/v1/responses" else "messages"
        send(url, place, json.dumps(BODIES[place] | {key: [message]}).encode("utf-8", "surrogatepass"))

    run()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/media", "/v1/requests/x/cancel", "/tokenize"])
def test_any_bytes_are_answered(url, path):
    types = st.sampled_from(
        ["application/json", "image/png", "text/plain", "multipart/form-data; boundary=x", "", "\x00"]
    )

    @fuzz
    @given(body=st.binary(max_size=4096), content_type=types)
    def run(body, content_type):
        send(url, path, body, content_type)

    run()


def test_any_damage_to_a_picture_is_answered(url):
    import base64

    file = base64.b64decode(image_url().partition(",")[2])

    @fuzz
    @given(at=st.integers(0, len(file) - 1), new=st.binary(max_size=16), cut=st.integers(0, len(file)))
    def run(at, new, cut):
        answer = send(url, "/v1/media", (file[:at] + new + file[at + len(new) :])[: cut or None], "image/png")
        if answer.status_code == 200:
            requests.delete(f"{url}/v1/media/{answer.json()['id']}", timeout=TIMEOUT_S)

    run()


@fuzz
@given(salt=st.text(max_size=30), media_id=st.text(min_size=1, max_size=30))
def test_any_id_and_any_salt_are_answered(url, salt, media_id):
    for path in ("/v1/media/", "/v1/requests/"):
        answer = requests.get(url + path + urllib.request.quote(media_id, safe=""), timeout=TIMEOUT_S)
        check(path, answer.status_code, answer.text)
    answer = requests.post(f"{url}/v1/media", params={"cache_salt": salt}, data=b"no picture", timeout=TIMEOUT_S)
    check("/v1/media", answer.status_code, answer.text)

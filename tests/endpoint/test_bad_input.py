"""Bad input is a 4xx with a reason, whoever refuses it; nothing of it reaches the broker."""

import json

import pytest
import pytest_asyncio

from epd.builtin import demo_image_path

from .fake_broker import says
from .serving import chat_body, image_url, serving, with_picture
from .test_limits import png_header

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]
DEMO = demo_image_path().read_bytes()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("endpoint")
    async with serving(folder, api_keys=["secret"], max_images=2, max_body_bytes=1 << 20) as served:
        served.broker.script = says([100])
        yield served


async def refused(served, path, body, status, **options):
    answer, text = await served.post(path, body, **options)
    assert answer.status == status, text
    assert not served.broker.submits
    error = json.loads(text)["error"]
    assert error["message"]
    return error["message"]


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"model": "unknown"}, 404, "unknown"),
        ({"messages": "hi"}, 400, "messages"),
        ({"messages": []}, 400, ""),
        ({"max_tokens": "many"}, 400, "max_tokens"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"max_tokens": 5000}, 400, "1024"),
        ({"temperature": -1}, 400, "temperature"),
        ({"n": 0}, 400, "n must be"),
        ({"logprobs": True, "top_logprobs": 1000}, 400, "logprobs"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, 400, "1024"),
        ({"messages": [{"role": "user", "content": [{"type": "nonsense", "x": 1}]}]}, 400, "nonsense"),
        ({"response_format": {"type": "json_schema"}}, 400, ""),
        ({"kv_transfer_params": {"do_remote_prefill": True}}, 400, "kv_transfer_params"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_vllm_and_the_pipeline_refuse(served, fields, status, words, stream):
    message = await refused(served, "/v1/chat/completions", chat_body(stream=stream) | fields, status)
    assert words in message


PICTURES = {
    "truncated": image_url(DEMO[: len(DEMO) // 2]),
    "not base64": "data:image/png;base64,%%%",
    "no picture": image_url(b"hello"),
    "huge": image_url(png_header(50_000, 50_000)),
    "empty": image_url(png_header(0, 0)),
    "elsewhere": "http://example.com/a.png",
    "metadata": "http://169.254.169.254/latest/meta-data",
    "file": "file:///etc/passwd",
}


@pytest.mark.parametrize("which", PICTURES)
async def test_bad_pictures_are_refused(served, which):
    await refused(served, "/v1/chat/completions", chat_body(with_picture(url=PICTURES[which])), 400)


async def test_too_many_pictures_are_refused(served):
    content = [*with_picture(""), *with_picture(""), *with_picture()]
    assert "2 images" in await refused(served, "/v1/chat/completions", chat_body(content), 400)


async def test_other_media_is_refused_with_a_reason(served):
    part = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
    await refused(served, "/v1/chat/completions", chat_body([part, {"type": "text", "text": "?"}]), 400)


async def test_a_picture_by_its_name_only_is_refused(served):
    part = {"type": "image_url", "image_url": None, "uuid": "cached"}
    await refused(served, "/v1/chat/completions", chat_body([part, {"type": "text", "text": "?"}]), 400)


async def test_bodies_that_are_not_json_or_too_large_are_refused(served):
    headers = {"Content-Type": "application/json"}
    for data, status in ((b"{", 400), (b"", 400), (b" " * ((1 << 20) + 1), 413), (b"[]", 400)):
        async with served.session.post("/v1/chat/completions", data=data, headers=headers) as answer:
            assert answer.status == status
            assert (await answer.json())["error"]["message"]
    async with served.session.post("/v1/chat/completions", data=b"a=b") as answer:
        assert 400 <= answer.status < 500


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize", "/invocations", "/v1/requests/x"])
async def test_without_the_key_nothing_is_told(served, path):
    for key in ("Bearer wrong", ""):
        ask = served.get if "requests" in path else served.post
        options = {} if "requests" in path else {"body": chat_body()}
        answer, text = await ask(path, **options, headers={"Authorization": key})
        assert answer.status == 401 and "error" in text


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
async def test_monitoring_needs_no_key(served, path):
    answer, _ = await served.get(path, headers={"Authorization": ""})
    assert answer.status == 200


async def test_the_endpoint_still_answers(served):
    answer, _ = await served.chat(content=with_picture())
    assert answer.status == 200
    assert len(served.broker.submits) == 1
    served.broker.submits.clear()

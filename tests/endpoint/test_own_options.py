"""Requests that choose how their media are processed: what the model was not made for is refused, and hurts nobody."""

import json

import pytest
import pytest_asyncio

from epd.errors import ErrorCode
from epd.messages import Failed

from .fake_broker import says
from .serving import chat_body, serving, with_picture

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("endpoint")
    async with serving(folder, serve={"trust_request_mm_kwargs": True}) as served:
        yield served


@pytest.fixture(autouse=True)
def answers(served):
    served.broker.submits.clear()
    served.broker.script = says([100])


async def ask(served, options, stream=False):
    body = chat_body(with_picture(), stream=stream, mm_processor_kwargs=options)
    answer, text = await served.post("/v1/chat/completions", body)
    return answer.status, text


OTHER_SHAPES = [
    {"max_image_size": {"longest_edge": 32}},
    {"max_image_size": {"longest_edge": 128}, "size": {"longest_edge": 128}},
    {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 32}},
]


@pytest.mark.parametrize("options", OTHER_SHAPES, ids=str)
@pytest.mark.parametrize("stream", [False, True])
async def test_shapes_that_the_encoder_was_not_made_for_are_refused(served, options, stream):
    status, text = await ask(served, options, stream)
    error = json.loads(text)["error"]
    assert status == 400 and "64x64" in error["message"], text
    assert not served.broker.submits


@pytest.mark.parametrize("options", [{"do_image_splitting": True}, {"size": {"longest_edge": 128}}], ids=str)
async def test_options_that_keep_the_models_shapes_are_taken(served, options):
    status, text = await ask(served, options)
    assert status == 200, text
    assert len(served.broker.submits) == 1


ODD = [
    {"size": 1}, {"size": {"longest_edge": 0}}, {"size": {"longest_edge": -5}}, {"size": {"height": 1}},
    {"max_image_size": {}}, {"max_image_size": None}, {"max_image_size": {"longest_edge": "x"}}, {"nonsense": 1},
    {"do_resize": False}, {"do_rescale": "x"}, {"image_mean": []}, {"image_std": [0, 0, 0]}, {"resample": 99},
    {"return_tensors": "np"}, {"images": ["http://127.0.0.1:9/x"]}, {"text": "x"}, {"do_image_splitting": False},
    {"device": "cuda"}, {"image_seq_len": 3}, {"input_data_format": "x"}, {"do_pad": False}, {"padding": "x"},
]  # fmt: skip


@pytest.mark.parametrize("options", ODD, ids=str)
async def test_any_options_are_answered_without_a_server_error(served, options):
    status, text = await ask(served, options)
    assert status < 500, text


async def test_what_the_encoder_fails_on_all_the_same_is_the_requests_fault(served):
    async def fails(broker, submit, _frames):
        await broker.send(
            Failed(
                request_id=submit.request_id,
                code=ErrorCode.ENCODE_FAILED,
                message="the encoder failed on it",
                status=502,
            )
        )

    served.broker.script = fails
    status, text = await ask(served, {"do_image_splitting": True})
    assert status == 400 and "mm_processor_kwargs" in text and "the encoder failed on it" in text
    status, text = await ask(served, None)
    assert status == 502 and "mm_processor_kwargs" not in text
    served.broker.script = says([100])
    assert (await ask(served, None))[0] == 200

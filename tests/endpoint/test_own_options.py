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


@pytest.mark.parametrize(
    "options",
    [{"size": {"longest_edge": 100_000}}, {"max_image_size": {"longest_edge": 10**9}}, {"size": 10**6},
     {"size": {"height": 10, "width": 1e30}}, {"max_pixels": 10**12}, {"images_kwargs": {"size": [5, 10**6]}},
     {"max_dynamic_patch": 10_000}, {"num_crops": 10_000}, {"max_slice_nums": 10**6}, {"num_frames": 10**6}],
    ids=str,
)  # fmt: skip
async def test_sizes_that_would_take_all_memory_are_refused(served, options):
    status, text = await ask(served, options)
    assert status == 400 and "at most" in text, text
    assert not served.broker.submits


@pytest.mark.parametrize(
    "options",
    [None, {}, {"max_pixels": 12_845_056, "min_pixels": 3136}, {"sampling_rate": 48_000}, {"x": [1e400]}, {"fps": 2},
     {"size": {"longest_edge": 2048}, "do_resize": True}, {"max_length": 480_000}, {"num_crops": 16}],
    ids=str,
)  # fmt: skip
async def test_usual_options_pass(options):
    from epd.config import EndpointConfig
    from epd.endpoint.media.own_options import check_options

    check_options(options, EndpointConfig())


async def test_the_request_is_blamed_if_the_encoder_fails_on_its_own_options_anyway(served):
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

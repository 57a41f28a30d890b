"""Pictures that come again: nothing is done twice, no pixels are sent without need, and nobody can name another's."""

import io

import pytest
import pytest_asyncio
from PIL import Image

from epd.messages import Failed

from .fake_broker import fails, needs_pixels, says
from .serving import chat_body, image_url, serving, with_picture
from .uploading import KEYS, media, names, picture, pixel_frames, pixel_frames_asked, state, through, upload

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("endpoint")
    options = {"max_images": 3, "max_body_bytes": 1 << 20, "media_max_per_key": 8, "media_ttl_s": 60.0}
    options["serve"] = {"trust_request_mm_kwargs": True}
    async with serving(folder, api_keys=KEYS, **options) as served:
        yield served


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def clean(served):
    broker = served.broker
    broker.script, broker.answer_uploads, broker.upload_error = says([100]), True, {}
    broker.submits.clear()
    broker.uploads.clear()
    served.kept = []
    yield
    for media_id, options in served.kept:
        async with served.session.delete(f"/v1/media/{media_id}", **options):
            pass


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
async def test_pixels_that_are_needed_after_all_are_sent_and_the_client_sees_one_answer(served, stream, n):
    told = await upload(served, picture())
    await state(served, told["id"], "ready")
    served.broker.script = needs_pixels(says([100, 101, 102]))
    answer, text = await served.post("/v1/chat/completions", chat_body(media(told["id"]), stream=stream, n=n))
    assert answer.status == 200 and "pixels_needed" not in text
    assert text.count('"finish_reason":"length"') == n
    submits = list(served.broker.submits)
    without = [each for each in submits if not any(patch.num_frames for patch in each.patches)]
    whole = [each for each in submits if each not in without]
    assert len(whole) == n and {each.request_id for each in without} <= {each.request_id for each in whole}
    assert without and all(patch.num_frames for each in whole for patch in each.patches)
    assert whole[-1].deadline_s <= without[0].deadline_s
    await served.chat(content=media(told["id"]))
    assert not pixel_frames_asked(served.broker.submits[len(submits)]), "they are there now"
    await served.idle()


async def test_pixels_are_not_sent_again_for_ever(served):
    async def script(broker, submit, _frames):
        await broker.send(Failed(request_id=submit.request_id, code="pixels_needed", message="gone", status=503))

    told = await upload(served, picture())
    await state(served, told["id"], "ready")
    served.broker.script = script
    answer, body = await served.chat(content=media(told["id"]))
    assert answer.status == 503 and body["error"]["type"] == "pixels_needed"
    assert [each.attempts for each in served.broker.submits] == [0, 1, 2, 3]


async def test_pixels_may_be_needed_in_the_middle_of_a_request(served):
    async def script(broker, submit, frames):
        if submit.attempts:
            await says([101, 102])(broker, submit, frames)
        else:
            await fails(after=[100], code="pixels_needed", message="the worker is gone", status=503)(
                broker, submit, frames
            )

    served.broker.script = script
    answer, body = await served.chat(content=with_picture(url=image_url(picture())), temperature=0)
    assert answer.status == 200 and body["usage"]["completion_tokens"] == 3
    first, second = served.broker.submits
    assert first.request_id == second.request_id and second.attempts == 1
    assert second.output_token_ids == [100] and all(patch.num_frames for patch in second.patches)


async def test_an_upload_with_other_settings_is_processed_again(served):
    told = await upload(served, picture((400, 300)))
    await state(served, told["id"], "ready")
    asked = {"content": media(told["id"])}
    answer, body = await served.chat(mm_processor_kwargs={"size": {"longest_edge": 64}}, **asked)
    assert answer.status == 200, body
    answer, body = await served.chat(media_io_kwargs={"image": {"rgba_background_color": [0, 0, 0]}}, **asked)
    assert answer.status == 200, body
    smaller, same = served.broker.submits
    assert len(smaller.patches) < told["patches"] and pixel_frames(served.broker, smaller)
    assert names(same) == names(served.broker.uploads[0]), "an opaque picture has no background"


async def test_questions_about_kept_pictures_skip_the_processor_and_reach_the_workers_the_same(served, monkeypatch):
    from vllm.model_executor.models.idefics3 import Idefics3MultiModalProcessor

    from epd.endpoint.media import repeats

    applied = []
    apply = Idefics3MultiModalProcessor.apply

    def counting(self, inputs, timing):
        applied.append(inputs.mm_data_items.get_all_counts()["image"])
        return apply(self, inputs, timing)

    files = [picture((256, 128)), picture((100, 200))]
    ids = [(await upload(served, file))["id"] for file in files]
    for media_id in ids:
        await state(served, media_id, "ready")
    kept = [*media(ids[0], "first"), *media(ids[1], "second"), *media(ids[0], "the first again")]
    one_new = [*media(ids[0], "first"), *with_picture("new", image_url(picture()))]
    monkeypatch.setattr(Idefics3MultiModalProcessor, "apply", counting)
    for most, content in ((repeats._MAX_TOKENS, kept), (0, kept), (repeats._MAX_TOKENS, one_new)):
        monkeypatch.setattr(repeats, "_MAX_TOKENS", most)
        answer, body = await served.chat(content=content, cache_salt="tenant")
        assert answer.status == 200, body
    assert applied == [3, 2], "only the prompt that is too long to look through at once, and the picture that is new"
    short, long, _ = (engine_request(served.broker, each) for each in served.broker.submits)
    assert short.prompt_token_ids == long.prompt_token_ids and short.cache_salt == long.cache_salt == "tenant"
    assert places(short) == places(long) and len(places(short)) > 3
    assert names(served.broker.submits[0]) == names(served.broker.submits[1])


def engine_request(broker, submit):
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.serial_utils import MsgpackDecoder

    return MsgpackDecoder(EngineCoreRequest).decode(broker.frames[submit.request_id][: submit.num_engine_frames])


def places(request):
    return [(each.identifier, each.mm_position.offset, each.mm_position.length) for each in request.mm_features]


async def test_repeated_pictures_are_processed_once_and_their_pixels_sent_once(served, monkeypatch):
    from vllm.model_executor.models.idefics3 import Idefics3MultiModalProcessor
    from vllm.multimodal.media.image import ImageMediaIO

    from epd.multimodal import splitter

    counts = {"processed": 0, "decoded": 0, "cut": 0}

    def counting(name, original, weigh=lambda *_, **__: 1):
        def call(*args, **kwargs):
            counts[name] += weigh(*args, **kwargs)
            return original(*args, **kwargs)

        return call

    monkeypatch.setattr(
        Idefics3MultiModalProcessor,
        "_apply_hf_processor_main",
        counting(
            "processed",
            Idefics3MultiModalProcessor._apply_hf_processor_main,
            lambda *_, mm_items, **__: mm_items.get_all_counts().get("image", 0),
        ),
    )
    monkeypatch.setattr(ImageMediaIO, "load_bytes", counting("decoded", ImageMediaIO.load_bytes))
    monkeypatch.setattr(splitter, "cut", counting("cut", splitter.cut))
    file = picture()
    for _ in range(3):
        answer, _ = await served.chat(content=with_picture(url=image_url(file)))
        assert answer.status == 200
    assert counts == {"processed": 1, "decoded": 1, "cut": 1}
    first, *others = served.broker.submits
    assert pixel_frames(served.broker, first)
    assert all(names(each) == names(first) and not pixel_frames(served.broker, each) for each in others)
    told = await upload(served, file)
    await served.chat(content=media(told["id"]))
    assert counts["processed"] == counts["cut"] == 1
    same = through(Image.open(io.BytesIO(file)), "BMP")
    assert same != file
    await served.chat(content=with_picture(url=image_url(same, "bmp")))
    assert counts["processed"] == counts["cut"] == 1, "the same pixels in another file"
    assert names(served.broker.submits[-1]) == names(first)


async def test_pixels_are_not_withheld_after_a_failure(served):
    served.broker.script = fails(code="worker_lost", message="gone", status=502)
    content = with_picture(url=image_url(picture()))
    await served.chat(content=content)
    served.broker.script = says([100])
    await served.chat(content=content)
    assert all(pixel_frames(served.broker, each) for each in served.broker.submits)


async def test_a_uuid_of_a_client_names_nothing(served):
    parts = [with_picture(url=image_url(picture()))[0] | {"uuid": "shared"} for _ in range(2)]
    text = {"type": "text", "text": "Read."}
    for part in parts:
        answer, _ = await served.chat(content=[part, text])
        assert answer.status == 200
    first, second = served.broker.submits
    # The overview and the tile with the noise differ; two pictures of one uuid are two pictures.
    assert names(first) != names(second) and pixel_frames(served.broker, second)
    answer, _ = await served.chat(content=[parts[0] | {"uuid": "other"}, text])
    assert names(served.broker.submits[2]) == names(first)
    told = await upload(served, picture())
    for part in (
        {"type": "image_url", "image_url": None, "uuid": "shared"},
        {"type": "image_url", "image_url": None, "uuid": told["id"]},
        {"type": "image_url", "image_url": None, "uuid": f"epd-media://{told['id']}"},
        {"type": "image_url", "uuid": "shared"},
    ):
        answer, body = await served.chat(content=[part, text])
        assert answer.status == 400, body
    assert len(served.broker.submits) == 3


@pytest.mark.parametrize("cache_gb", [0, 0.0006])
async def test_a_processor_cache_that_holds_one_picture_or_none(served, tmp_path, cache_gb):
    async with serving(tmp_path, serve={"mm_processor_cache_gb": cache_gb}) as other:
        other.broker.script, other.kept = says([100]), []
        first, second = picture((256, 128)), picture((256, 128))
        told = await upload(other, first)
        content = [*with_picture("", image_url(first)), *with_picture("", image_url(second)), *media(told["id"])]
        for _ in range(3):
            answer, body = await other.chat(content=content)
            assert answer.status == 200, body
        for url, start in ((image_url(second), 9), (image_url(first), 0)):
            await other.chat(content=with_picture(url=url))
            assert names(other.broker.submits[-1]) == names(other.broker.submits[0])[start : start + 9]
        assert names(other.broker.submits[0])[18:] == names(other.broker.uploads[0])

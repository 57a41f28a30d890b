"""Pictures that are uploaded ahead: what is kept, encoded, referred to, and for whom."""

import asyncio
import json
import time

import pytest
import pytest_asyncio

from epd.builtin import demo_image_path
from epd.messages import Uploaded

from .fake_broker import says
from .serving import chat_body, image_url, serving, until, with_picture
from .test_limits import png_header
from .uploading import KEYS, key, media, names, picture, pixel_frames, pixel_frames_asked, state, upload

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]
DEMO = demo_image_path().read_bytes()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("endpoint")
    options = {"max_images": 2, "max_body_bytes": 1 << 20, "media_max_per_key": 8, "media_ttl_s": 60.0}
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


async def test_an_upload_sends_what_a_chat_with_the_file_would_have_sent(served):
    file = picture()
    served.broker.answer_uploads = False
    told = await upload(served, file)
    answer, _ = await served.chat(content=with_picture(url=image_url(file)))
    (submit,), (sent_ahead,) = served.broker.submits, served.broker.uploads
    sent = pixel_frames(served.broker, submit)
    assert answer.status == 200 and sent
    assert sent_ahead.patches == submit.patches and told["patches"] == len(submit.patches) > 1
    assert [bytes(frame) for frame in served.broker.upload_frames[sent_ahead.upload_id]] == sent
    assert (told["width"], told["height"]) == (200, 120)
    assert 0 < told["expires"] - time.time() <= 60 and 0 < sent_ahead.ttl_s <= 60
    assert len(told["id"]) >= 32 and told["id"] != sent_ahead.upload_id


async def test_an_upload_of_a_picture_that_was_asked_about_needs_no_pixels_unless_they_are_gone(served):
    file = picture()
    await served.chat(content=with_picture(url=image_url(file)))
    served.broker.upload_error = {"code": "pixels_needed", "message": "gone", "status": 503}
    told = await upload(served, file)
    await until(lambda: len(served.broker.uploads) == 2)
    first, second = served.broker.uploads
    assert first.upload_id == second.upload_id and names(first) == names(second)
    assert not pixel_frames_asked(first) and pixel_frames_asked(second)
    served.broker.upload_error = {}
    await served.broker.send(Uploaded(upload_id=second.upload_id))
    await state(served, told["id"], "ready")


async def test_an_upload_waits_for_a_pipeline_that_is_not_whole(served):
    served.broker.upload_error = {"code": "not_ready", "message": "no encode worker", "status": 503}
    told = await upload(served, picture())
    await state(served, told["id"], "failed")
    served.broker.upload_error = {}
    await state(served, told["id"], "ready")


async def test_a_chat_with_an_upload_sends_its_patches_without_pixels(served):
    told = await upload(served, picture())
    await state(served, told["id"], "ready")
    answer, body = await served.chat(content=media(told["id"]))
    assert answer.status == 200, body
    (submit,) = served.broker.submits
    assert names(submit) == names(served.broker.uploads[0])
    assert all(patch.num_frames == 0 for patch in submit.patches) and not pixel_frames(served.broker, submit)


async def test_a_chat_before_the_upload_is_encoded_sends_pixels(served):
    served.broker.answer_uploads = False
    told = await upload(served, picture())
    assert told["state"] == "encoding"
    answer, _ = await served.chat(content=media(told["id"]))
    (submit,) = served.broker.submits
    (sent_ahead,) = served.broker.uploads
    assert answer.status == 200 and submit.patches == sent_ahead.patches
    assert pixel_frames(served.broker, submit) == [
        bytes(frame) for frame in served.broker.upload_frames[sent_ahead.upload_id]
    ]


async def test_an_upload_that_failed_is_encoded_as_usual(served):
    served.broker.upload_error = {"code": "overloaded", "message": "no room", "status": 503}
    told = await upload(served, picture())
    await state(served, told["id"], "failed")
    _, text = await served.get(f"/v1/media/{told['id']}")
    assert json.loads(text)["reason"] == "overloaded: no room"
    answer, _ = await served.chat(content=media(told["id"]))
    assert answer.status == 200 and pixel_frames(served.broker, served.broker.submits[0])


async def test_every_api_takes_uploads(served):
    told = await upload(served, picture())
    await state(served, told["id"], "ready")
    url = f"epd-media://{told['id']}"
    part = {"type": "input_image", "image_url": url, "detail": "auto"}
    responses = {"input": [{"role": "user", "content": [part, {"type": "input_text", "text": "Read."}]}]}
    source = {"type": "image", "source": {"type": "url", "url": url}}
    messages = [{"role": "user", "content": [source, {"type": "text", "text": "Read."}]}]
    for path, fields in (
        ("/v1/responses", responses),
        ("/v1/messages", {"max_tokens": 4, "messages": messages}),
    ):
        answer, text = await served.post(path, {"model": "digits", **fields})
        assert answer.status == 200, text
        submit = served.broker.submits.pop()
        assert names(submit) == names(served.broker.uploads[0])
        assert not pixel_frames(served.broker, submit)


@pytest.mark.parametrize("which", ["unknown", "another's", "dropped"])
async def test_an_id_that_is_not_there_is_not_found_in_each_api(served, which):
    media_id = "unknown"
    if which != "unknown":
        options = key(1) if which == "another's" else {}
        media_id = (await upload(served, picture(), **options))["id"]
    if which == "dropped":
        async with served.session.delete(f"/v1/media/{media_id}") as answer:
            assert answer.status == 200
        await until(lambda: served.broker.drops[-1:] == [served.broker.uploads[-1].upload_id])
    url = f"epd-media://{media_id}"
    source = {"type": "image", "source": {"type": "url", "url": url}}
    part = {"type": "input_image", "image_url": url, "detail": "auto"}
    bodies = {
        "/v1/chat/completions": chat_body(media(media_id)),
        "/v1/responses": {"model": "digits", "input": [{"role": "user", "content": [part]}]},
        "/v1/messages": {"model": "digits", "max_tokens": 4, "messages": [{"role": "user", "content": [source]}]},
    }
    for path, body in bodies.items():
        answer, text = await served.post(path, body)
        assert answer.status == 404, text
        told = json.loads(text)
        assert told["error"]["type"] == "media_not_found"
        assert (told.get("type") == "error") == (path == "/v1/messages")
    for ask in (served.session.get, served.session.delete):
        async with ask(f"/v1/media/{media_id}") as answer:
            assert answer.status == 404 and (await answer.json())["error"]["type"] == "media_not_found"
    assert not served.broker.submits


async def test_without_a_key_nothing_is_taken(served):
    for options in ({"headers": {"Authorization": "Bearer wrong"}}, {"headers": {"Authorization": ""}}):
        async with served.session.post("/v1/media", data=DEMO, **options) as answer:
            assert answer.status == 401


@pytest.mark.parametrize(
    ("file", "status", "code"),
    [
        (b"", 400, "invalid_image"),
        (b"hello", 400, "invalid_image"),
        (DEMO[: len(DEMO) // 2], 400, "invalid_image"),
        (png_header(50_000, 50_000), 400, "image_too_large"),
        (png_header(0, 0), 400, "invalid_image"),
        (b" " * ((1 << 20) + 1), 413, "body_too_large"),
    ],
)
@pytest.mark.parametrize("content_type", ["image/png", "application/json", "text/plain"])
async def test_bad_pictures_are_refused_and_not_sent_on(served, file, status, code, content_type):
    _, error = await upload(served, file, status, headers={"Content-Type": content_type} | key(0)["headers"])
    assert error["type"] == code and error["message"]
    assert not served.broker.uploads


async def test_a_key_may_keep_so_many_pictures(served):
    for _ in range(8):
        await upload(served, DEMO)
    answer, error = await upload(served, DEMO, 429)
    assert error["type"] == "media_quota" and 1 <= int(answer.headers["Retry-After"]) <= 60
    await upload(served, DEMO, **key(1))


async def test_uploads_count_as_pictures(served):
    told = await upload(served, DEMO)
    content = [*media(told["id"], ""), *media(told["id"], ""), *media(told["id"])]
    answer, body = await served.chat(content=content)
    assert answer.status == 400 and "2 images" in body["error"]["message"]


async def test_a_picture_with_another_salt_has_other_names(served):
    file = picture()
    told = await upload(served, file, query="?cache_salt=mine")
    await state(served, told["id"], "ready")
    _, _ = await served.chat(content=media(told["id"]), cache_salt="mine")
    _, _ = await served.chat(content=media(told["id"]), cache_salt="other")
    _, _ = await served.chat(content=with_picture(url=image_url(file)))
    mine, other, none = served.broker.submits
    assert names(mine) == names(served.broker.uploads[0]) and not pixel_frames(served.broker, mine)
    assert not {*names(mine)} & {*names(other)} and not {*names(none)} & {*names(mine), *names(other)}
    assert pixel_frames(served.broker, other) == pixel_frames(served.broker, none) != []


async def test_a_request_keeps_what_it_refers_to(served, monkeypatch):
    """The picture is dropped between the check of the body and vLLM's processing."""
    from vllm.renderers.online_renderer import OnlineRenderer

    told = await upload(served, picture())
    plain = OnlineRenderer.render_chat

    async def slow(self, request, **options):
        async with served.session.delete(f"/v1/media/{told['id']}") as answer:
            assert answer.status == 200
        return await plain(self, request, **options)

    monkeypatch.setattr(OnlineRenderer, "render_chat", slow)
    answer, body = await served.chat(content=media(told["id"]))
    assert answer.status == 200, body
    assert names(served.broker.submits[0]) == names(served.broker.uploads[0])


async def test_the_broker_comes_back_and_gets_the_uploads_again(served):
    told = await upload(served, picture())
    await state(served, told["id"], "ready")
    (first,) = served.broker.uploads
    served.broker.answer_uploads = False
    hellos = served.broker.num_hellos
    await served.broker.forget()
    await until(lambda: served.broker.num_hellos > hellos and len(served.broker.uploads) > 1)
    again = next(each for each in served.broker.uploads[1:] if each.upload_id == first.upload_id)
    assert again.patches == first.patches and again.ttl_s <= first.ttl_s
    await state(served, told["id"], "encoding")
    await served.ready()
    await served.chat(content=media(told["id"]))
    assert pixel_frames(served.broker, served.broker.submits[0]), "nothing is believed of a new broker"
    await served.broker.send(Uploaded(upload_id=first.upload_id))
    await state(served, told["id"], "ready")


async def test_uploads_at_the_same_time_can_all_be_asked_about(served):
    told = await asyncio.gather(*(upload(served, picture()) for _ in range(4)))
    assert len({each["id"] for each in told}) == 4
    answers = await asyncio.gather(*(served.chat(content=media(each["id"])) for each in told))
    assert all(answer.status == 200 for answer, _ in answers)


async def test_a_picture_expires(served, tmp_path):
    async with serving(tmp_path, media_ttl_s=0.3) as other:
        other.broker.script, other.kept = says([100]), []
        told = await upload(other, DEMO)
        answer, _ = await other.chat(content=media(told["id"]))
        assert answer.status == 200
        await asyncio.sleep(0.3)
        answer, body = await other.chat(content=media(told["id"]))
        assert answer.status == 404 and body["error"]["type"] == "media_not_found"

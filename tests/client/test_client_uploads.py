from __future__ import annotations

import asyncio
import gc
import io
import os
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from fake_endpoint import DONE, ROLE, FakeEndpoint, complete, error, event, not_found, streamed
from PIL import Image

from epd.client import AsyncClient, BadRequest, Client, NotFound, Overloaded, Picture, PictureError
from epd.client.pictures import LocalPicture
from epd.client.types import Media


def encoded(color: int = 200, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (color, 10, 30)).save(buffer, kind)
    return buffer.getvalue()


def urls(endpoint: FakeEndpoint) -> list[str]:
    """The URL of the last picture of each chat, up to the data."""
    parts = [body["messages"][-1]["content"] for body in endpoint.bodies]
    return [next(p["image_url"]["url"] for p in content if p["type"] == "image_url")[:14] for content in parts]


SENT = "data:image/png"


async def test_an_upload_is_a_picture(endpoint: FakeEndpoint, client: AsyncClient, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded())
    pictures: list[Picture] = [path, str(path), encoded(), bytearray(encoded())]
    for picture in pictures:
        media = await client.upload(picture, cache_salt="a b&c")
        assert endpoint.uploads.pop() == (encoded(), "a b&c")
        assert endpoint.upload_headers[-1]["Content-Type"] == "image/png"
    assert isinstance(media, Media) and (media.width, media.height, media.patches) == (4, 3, 9)
    await client.generate("?", images=[media])
    await client.generate("?", images=[media.url])
    await client.generate(messages=[{"role": "user", "content": [{"type": "image", "image": media}]}])
    assert urls(endpoint) == [media.url[:14]] * 3 == ["epd-media://m1"] * 3
    assert endpoint.uploads == []


async def test_a_pil_image_is_uploaded_as_png(endpoint: FakeEndpoint, client: AsyncClient) -> None:
    await client.upload(Image.new("RGB", (7, 5), "red"))
    assert Image.open(io.BytesIO(endpoint.uploads[0][0])).size == (7, 5)


def test_the_synchronous_client_uploads_too(endpoint: FakeEndpoint) -> None:
    with Client(endpoint.url, api_key="k") as client:
        media = client.upload(encoded())
        client.generate("?", images=[media])
    assert urls(endpoint) == ["epd-media://m1"]
    assert endpoint.upload_headers[0]["Authorization"] == "Bearer k"


@pytest.mark.parametrize("picture", ["http://a/b.png", "data:image/png;base64,AAAA", "epd-media://m", b"text", 7])
async def test_what_cannot_be_uploaded_is_a_picture_error(client: AsyncClient, picture: Any) -> None:
    with pytest.raises(PictureError):
        await client.upload(picture)


async def test_refused_uploads_raise(endpoint: FakeEndpoint, client: AsyncClient) -> None:
    endpoint.refuse_upload = lambda: error(429, "enough", Retry_After="7")
    with pytest.raises(Overloaded) as caught:
        await client.upload(encoded())
    assert caught.value.retry_after_s == 7
    endpoint.refuse_upload = lambda: error(400, "no picture")
    with pytest.raises(BadRequest):
        await client.upload(encoded())


async def test_an_upload_that_has_expired_is_not_found(endpoint: FakeEndpoint, client: AsyncClient) -> None:
    async def answer(request: web.Request) -> web.Response:
        return not_found()

    media = await client.upload(encoded())
    endpoint.answer = answer
    with pytest.raises(NotFound):
        await client.generate("?", images=[media])
    assert len(endpoint.bodies) == 1, "the caller chose to refer to it"


def in_file(tmp_path: Path) -> Picture:
    path = tmp_path / "a.png"
    if not path.exists():
        path.write_bytes(encoded())
    return path


MAKERS: dict[str, Callable[[Path], Picture]] = {
    "bytes": lambda _: encoded(),
    "path": in_file,
    "string": lambda tmp_path: str(in_file(tmp_path)),
    "pil": lambda _: Image.new("RGB", (4, 3), (200, 10, 30)),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
async def test_a_picture_is_uploaded_when_it_is_used_again(
    endpoint: FakeEndpoint, client: AsyncClient, make: Callable[[Path], Picture], tmp_path: Path
) -> None:
    for _ in range(4):
        await client.generate("?", images=[make(tmp_path)])
    assert urls(endpoint) == [SENT, *["epd-media://m1"] * 3]
    assert len(endpoint.uploads) == 1
    await client.generate("?", images=[encoded(3)])
    assert urls(endpoint)[-1] == SENT


async def test_pictures_in_messages_are_reused_too(endpoint: FakeEndpoint, client: AsyncClient) -> None:
    for _ in range(2):
        await client.generate(messages=[{"role": "user", "content": [{"type": "image", "image": encoded()}]}])
    assert urls(endpoint) == [SENT, "epd-media://m1"]


async def test_a_file_that_has_changed_is_another_picture(
    endpoint: FakeEndpoint, client: AsyncClient, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    for color in (1, 1, 2):
        path.write_bytes(encoded(color))
        os.utime(path, ns=(color, color))
        await client.generate("?", images=[path])
    assert urls(endpoint) == [SENT, "epd-media://m1", SENT]


async def test_the_salt_of_the_call_is_that_of_the_upload(endpoint: FakeEndpoint, client: AsyncClient) -> None:
    for salt in ("a", "a", None):
        await client.generate("?", images=[encoded()], cache_salt=salt)
    assert urls(endpoint) == [SENT, "epd-media://m1", SENT]
    assert [salt for _, salt in endpoint.uploads] == ["a"]


async def test_calls_at_once_share_one_upload(endpoint: FakeEndpoint, client: AsyncClient) -> None:
    await client.generate("?", images=[encoded()])
    await asyncio.gather(*(client.generate("?", images=[encoded()]) for _ in range(8)))
    assert urls(endpoint)[1:] == ["epd-media://m1"] * 8 and len(endpoint.uploads) == 1


async def test_an_upload_that_is_about_to_expire_is_made_again(endpoint: FakeEndpoint, client: AsyncClient) -> None:
    endpoint.media_expires_in = 2
    for _ in range(3):
        await client.generate("?", images=[encoded()])
    assert urls(endpoint) == [SENT, "epd-media://m1", "epd-media://m2"]


@pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
async def test_where_uploads_are_refused_the_picture_is_sent(
    endpoint: FakeEndpoint, client: AsyncClient, status: int
) -> None:
    endpoint.refuse_upload = lambda: error(status, "no")
    for _ in range(4):
        assert (await client.generate("?", images=[encoded()])).text == "hello"
    assert urls(endpoint) == [SENT] * 4
    assert len(endpoint.uploads) == 1, "it is not asked each time"


@pytest.mark.parametrize("stream", [False, True])
async def test_where_an_upload_is_gone_the_picture_is_sent(
    endpoint: FakeEndpoint, client: AsyncClient, stream: bool
) -> None:
    plain = streamed(ROLE, event("hello", finish="stop"), DONE) if stream else complete("hello")

    async def answer(request: web.Request) -> web.StreamResponse:
        return not_found() if "epd-media" in await request.text() else await plain(request)

    endpoint.answer = answer
    for _ in range(2):
        if stream:
            assert "".join([chunk.text async for chunk in client.stream("?", images=[encoded()])]) == "hello"
        else:
            assert (await client.generate("?", images=[encoded()])).text == "hello"
    assert urls(endpoint) == [SENT, "epd-media://m1", SENT]


async def test_nothing_is_uploaded_if_not_wanted(endpoint: FakeEndpoint) -> None:
    async with AsyncClient(endpoint.url, reuse_pictures=False) as client:
        for _ in range(3):
            await client.generate("?", images=[encoded()])
    assert urls(endpoint) == [SENT] * 3 and not endpoint.uploads


@pytest.mark.parametrize("as_text", [False, True])
async def test_a_file_overwritten_with_one_of_the_same_size_and_times_is_another_picture(
    endpoint: FakeEndpoint, client: AsyncClient, tmp_path: Path, as_text: bool
) -> None:
    """As `copy2`, `unzip` and `rsync -t --inplace` do; the inode stays too."""
    path = tmp_path / "current.bmp"
    facts = set()
    for color in (1, 1, 2, 2, 1):
        content = encoded(color, "BMP")
        with path.open("r+b" if path.exists() else "wb") as file:
            file.write(content)
        os.utime(path, (1_700_000_000,) * 2)
        found = path.stat()
        facts.add((found.st_mtime_ns, found.st_size, found.st_ino))
        await client.generate("?", images=[str(path) if as_text else path])
    assert len(facts) == 1
    sent = "data:image/bmp"
    assert urls(endpoint) == [sent, "epd-media://m1", sent, "epd-media://m2", "epd-media://m1"]
    assert [content for content, _ in endpoint.uploads] == [encoded(1, "BMP"), encoded(2, "BMP")]


async def test_the_same_picture_in_another_file_is_known(
    endpoint: FakeEndpoint, client: AsyncClient, tmp_path: Path
) -> None:
    for number in range(3):
        path = tmp_path / f"{number}.png"
        path.write_bytes(encoded())
        await client.generate("?", images=[path])
    assert urls(endpoint) == [SENT, "epd-media://m1", "epd-media://m1"]


async def test_a_picture_that_is_gone_from_the_server_is_sent_as_it_was_asked_about(
    endpoint: FakeEndpoint, client: AsyncClient, tmp_path: Path
) -> None:
    """The file has changed meanwhile, and an open file or a generator cannot be read again."""
    path = tmp_path / "a.png"

    async def answer(request: web.Request) -> web.StreamResponse:
        path.unlink(missing_ok=True)
        return not_found() if "epd-media" in await request.text() else await complete("hello")(request)

    endpoint.answer = answer
    for _ in range(2):
        path.write_bytes(encoded())
        pictures = (each for each in [path, io.BytesIO(encoded(9))])
        assert (await client.generate("?", images=pictures)).text == "hello"
    *_, referred, sent = (body["messages"][0]["content"][:2] for body in endpoint.bodies)
    assert [part["image_url"]["url"][:9] for part in referred] == ["epd-media"] * 2
    assert sent == endpoint.bodies[0]["messages"][0]["content"][:2]


async def test_a_stream_that_has_begun_holds_no_pictures(endpoint: FakeEndpoint, client: AsyncClient) -> None:
    endpoint.answer = streamed(event("a"), event("b", finish="stop"), DONE)
    async with aclosing(client.stream("?", images=[encoded(), Image.new("RGB", (4, 3))])) as chunks:
        await anext(chunks)
        assert not [thing for thing in gc.get_objects() if type(thing) is LocalPicture]

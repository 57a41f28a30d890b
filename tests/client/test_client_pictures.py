from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import FakeEndpoint
from PIL import Image

from epd.client import AsyncClient, EPDError, Picture, PictureError
from epd.client.chat import Chat
from epd.client.pictures import picture_or_url

KINDS = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "BMP": "image/bmp",
    "TIFF": "image/tiff",
    "AVIF": "image/avif",
    "JPEG2000": "image/jp2",
    "ICO": "image/x-icon",
}


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 24), (200, 10, 30)).save(buffer, kind)
    return buffer.getvalue()


def picture_url(picture: Any) -> str:
    """What stands for a picture in a request."""
    place = picture_or_url(picture)
    if isinstance(place, str):
        return place
    place.load()
    return place.url()


def parts(url: str) -> tuple[str, bytes]:
    head, data = url.split(",", 1)
    return head, base64.b64decode(data, validate=True)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_and_files_are_sent_unchanged_with_their_type(kind: str, tmp_path: Path) -> None:
    data = encoded(kind)
    path = tmp_path / "picture.with-any-name"
    path.write_bytes(data)
    expected = (f"data:{KINDS[kind]};base64", data)
    for picture in (data, bytearray(data), memoryview(data), path, str(path)):
        assert parts(picture_url(picture)) == expected


@pytest.mark.parametrize(
    "url",
    ["http://a/b.png", "HTTPS://a/b.png", "data:image/png;base64,AAAA", "epd-media:sha256/abc", "file:///x/y.png"],
)
def test_urls_are_handed_on(url: str) -> None:
    assert picture_url(url) == url


def test_a_missing_file_is_a_picture_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match=r"there is no picture file .*missing\.png"):
        picture_url(str(tmp_path / "missing.png"))
    assert issubclass(PictureError, EPDError)
    assert issubclass(PictureError, ValueError)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (b"", "empty"),
        (b"%PDF-1.7", "not PNG"),
        (b"RIFF1234WAVE", "not PNG"),
        ("ftp://a/b.png", "no picture file"),
        ("a\0b", "cannot read"),
        (7, "not int"),
        (None, "not NoneType"),
        ({"url": "x"}, "not dict"),
        (["a.png"], "not list"),
    ],
)
def test_a_file_that_is_not_a_picture_is_refused_with_a_reason(picture: Any, message: str) -> None:
    with pytest.raises(PictureError, match=message):
        picture_url(picture)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="cannot read"):
        picture_url(tmp_path)


def test_a_pil_image_of_a_truncated_file_is_refused() -> None:
    image = Image.open(io.BytesIO(encoded("PNG")[:-25]))
    with pytest.raises(PictureError, match="cannot read this RGB image"):
        picture_url(image)


def sent_messages(messages: list[dict[str, Any]]) -> Any:
    chat = Chat(None, {"messages": messages})
    chat.load()
    return json.loads(chat.body())["messages"]


def test_image_parts_of_messages_are_converted_and_the_rest_is_kept() -> None:
    text = {"type": "text", "text": "?"}
    part = {"type": "image", "image": encoded("PNG"), "uuid": "u1"}
    messages: list[dict[str, Any]] = [{"role": "system", "content": "s"}, {"role": "user", "content": [part, text]}]
    converted = sent_messages(messages)
    assert converted[0] == messages[0]
    assert converted[1]["content"] == [
        {"type": "image_url", "uuid": "u1", "image_url": {"url": picture_url(encoded("PNG"))}},
        text,
    ]
    assert part["type"] == "image", "the caller's messages are left alone"


@pytest.mark.parametrize("make", [lambda url: url, lambda url: {"url": url, "detail": "low"}])
def test_a_picture_may_stand_where_the_api_has_its_url(make: Any) -> None:
    content = [{"type": "image_url", "image_url": make(encoded("PNG"))}]
    [sent] = sent_messages([{"role": "user", "content": content}])[0]["content"]
    assert sent == {"type": "image_url", "image_url": {**make({}), **sent["image_url"]}}
    assert sent["image_url"]["url"] == picture_url(encoded("PNG"))


@pytest.mark.parametrize("value", ["a.png", {"url": "a.png"}, {"url": "http://a/b"}, {}, None])
def test_what_the_api_has_as_a_url_is_sent_as_it_is(value: Any) -> None:
    message = {"role": "user", "content": [{"type": "image_url", "image_url": value}]}
    if value is None:
        with pytest.raises(PictureError, match="not NoneType"):
            sent_messages([message])
    else:
        assert sent_messages([message]) == [message]


def test_an_image_part_without_a_picture_is_refused() -> None:
    with pytest.raises(PictureError, match='"image"'):
        sent_messages([{"role": "user", "content": [{"type": "image", "url": "x"}]}])


async def test_pictures_come_before_the_text_in_the_request(
    endpoint: FakeEndpoint, client: AsyncClient, tmp_path: Path
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encoded("PNG"))
    images: list[Picture] = [path, encoded("JPEG"), "https://a/b.png", Image.new("RGB", (2, 2))]
    await client.generate("what is this?", images=images)
    [message] = endpoint.bodies[0]["messages"]
    kinds = [part["type"] for part in message["content"]]
    assert kinds == ["image_url"] * 4 + ["text"]
    urls = [part["image_url"]["url"] for part in message["content"][:-1]]
    assert urls == [picture_url(image) for image in images]


async def test_a_missing_file_is_noticed_before_anything_is_sent(endpoint: FakeEndpoint, client: AsyncClient) -> None:
    with pytest.raises(PictureError):
        await client.generate("?", images=["/no/such/file"])
    with pytest.raises(PictureError):
        await anext(client.stream("?", images=["/no/such/file"]))
    assert endpoint.bodies == []

"""What is refused before any engine or decoder sees it, and with which words."""

import asyncio
import base64
import gc
import io
import json
import struct
import threading
import zlib

import pytest
from PIL import Image

from epd.config import EndpointConfig
from epd.endpoint.http.limits import Limits, media_of, read_json
from epd.endpoint.http.refusals import RefusedError
from epd.endpoint.media.bounds import MediaBounds

from .asgi_call import call

JSON = [(b"content-type", b"application/json")]


def picture(kind="PNG", size=(8, 6), mode="RGB"):
    data = io.BytesIO()
    Image.new(mode, size, 128).save(data, kind)
    return data.getvalue()


def png_header(width, height):
    """A PNG that says it is that large and holds nothing."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def data_url(content, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def chat(*urls):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": "?"}]}]}


async def send(body, path="/v1/chat/completions", headers=JSON, resolve=lambda host: ["93.184.216.34"], **config):
    """Sends a body through `Limits`; the application behind it answers 200 with the body."""

    async def app(_scope, receive, send):
        message = await receive()
        assert not message["more_body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": message["body"]})

    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return await call(Limits(app, MediaBounds(EndpointConfig(**config)), resolve), path, body=body, headers=headers)


async def refused(body, status, code, **options):
    answer = await send(body, **options)
    assert answer.status == status, answer.body
    assert answer.error["type"] == code and answer.error["message"]
    return answer.error["message"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
async def test_pictures_of_the_known_formats_pass_with_the_body_untouched(kind):
    body = json.dumps(chat(data_url(picture(kind)))).encode()
    answer = await send(body)
    assert answer.status == 200 and answer.body == body


async def test_a_body_that_is_too_large_is_413_by_its_declared_length():
    headers = [*JSON, (b"content-length", b"1001")]
    assert "1001" in await refused(b"{}", 413, "body_too_large", headers=headers, max_body_bytes=1000)


async def test_a_body_that_is_too_large_is_413_by_its_real_length():
    await refused(b" " * 2000, 413, "body_too_large", max_body_bytes=1000)


@pytest.mark.parametrize(
    "body", [b"{", b"\xff\xfe", b'{"a": "\\ud800"}', b'{"a": "\xed\xa0\x80"}', b"[" * 100_000, b"{} {}"]
)
async def test_malformed_json_is_400(body):
    await refused(body, 400, "invalid_json")


def test_no_finalizer_runs_deep_inside_of_a_nested_body():
    seen, threshold = [], gc.get_threshold()
    watch = lambda phase, info: seen.append(phase)  # noqa: E731
    gc.callbacks.append(watch)
    gc.set_threshold(10)
    try:
        with pytest.raises(RefusedError, match="nested too deeply"):
            media_of("/v1/chat/completions", b"[" * 100_000, EndpointConfig())
        before = len(seen)
        assert read_json(b"[" * 200 + b"]" * 200)
        assert len(seen) == before
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(watch)
    assert gc.isenabled()


async def test_a_body_that_is_not_json_is_left_to_vllm():
    answer = await send(b"a=1", headers=[(b"content-type", b"application/x-www-form-urlencoded")])
    assert answer.status == 200


async def test_too_many_images_are_refused():
    urls = [data_url(picture())] * 3
    assert (await send(chat(*urls), max_images=3)).status == 200
    assert "more than 2 images" in await refused(chat(*urls), 400, "too_many_images", max_images=2)


@pytest.mark.parametrize(
    "url",
    [
        "data:image/png;base64,!!!",
        "data:image/png;base64,",
        data_url(b"no picture"),
        data_url(b"%PDF-1.7 ..."),
        data_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
        data_url(picture()[:20]),
        data_url(png_header(0, 0)),
        data_url(png_header(0, 5)),
    ],
)
async def test_a_file_that_is_not_a_picture_is_refused(url):
    await refused(chat(url), 400, "invalid_image")


@pytest.mark.parametrize("url", ["data:image/png,abc", "data:", "ftp://a/b", "nonsense", "", "//host/x.png"])
async def test_addresses_of_other_kinds_are_refused(url):
    await refused(chat(url), 400, "invalid_url")


async def test_a_huge_picture_is_refused_by_its_header():
    message = await refused(chat(data_url(png_header(50_000, 50_000))), 400, "image_too_large")
    assert "pixels" in message
    await refused(chat(data_url(picture(size=(100, 101)))), 400, "image_too_large", max_pixels=10_000)
    assert (await send(chat(data_url(picture(size=(100, 100)))), max_pixels=10_000)).status == 200


BAD = data_url(b"no picture")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"content": [{"image_url": BAD}]}]}),
        ("/v1/chat/completions", {"messages": [{"content": [{"image_url": {"url": BAD}, "uuid": "x"}]}]}),
        ("/v1/chat/completions/batch", {"messages": [[{"content": [{"image_url": {"url": BAD}}]}]]}),
        ("/v1/responses", {"input": [{"content": [{"type": "input_image", "image_url": BAD}]}]}),
        ("/tokenize", {"messages": [{"content": [{"image_url": {"url": BAD}}]}]}),
    ],
)
async def test_pictures_are_found_in_every_api(path, body):
    await refused(body, 400, "invalid_image", path=path)


@pytest.mark.parametrize(
    "source",
    [
        {"type": "base64", "media_type": "image/png", "data": base64.b64encode(b"no picture").decode()},
        {"type": "url", "url": "http://169.254.169.254/latest"},
    ],
)
async def test_anthropics_pictures_are_checked_and_refused_in_its_shape(source):
    image = {"type": "image", "source": source}
    for content in ([image], [{"type": "tool_result", "content": [image]}]):
        answer = await send({"messages": [{"role": "user", "content": content}]}, path="/v1/messages")
        assert answer.status == 400
        told = json.loads(answer.body)
        assert told["type"] == "error" and told["error"]["type"] in ("invalid_image", "url_not_allowed")


async def test_a_schema_that_mentions_images_is_not_an_image():
    tools = [{"function": {"parameters": {"properties": {"image_url": {"type": "string"}}}}}]
    assert (await send({"messages": [{"content": "hi"}], "tools": tools})).status == 200


async def test_tool_arguments_that_mention_images_are_not_images():
    call = {"type": "tool_use", "id": "t", "name": "f", "input": {"image_url": "http://10.0.0.1/"}}
    text = {"type": "text", "text": "x", "video_url": "s3://bucket/x"}
    assert (await send({"messages": [{"content": [call]}, {"content": [text]}]}, path="/v1/messages")).status == 200


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
async def test_a_body_in_any_of_jsons_encodings_comes_as_utf_8(encoding):
    body = json.dumps(chat(data_url(picture())) | {"user": "\u00e9"}, ensure_ascii=False)
    answer = await send(body.encode(encoding))
    assert answer.status == 200 and answer.body == body.encode()


@pytest.mark.parametrize("body", [b"\xff\xfe{\x00}", b"\xff\xfe\x00\xd8", b"\xef\xbb\xbf", b"\xef\xbb\xbf\xff"])
async def test_a_body_that_is_not_in_the_encoding_that_it_begins_as_is_400(body):
    await refused(body, 400, "invalid_json")


async def test_pictures_that_take_too_much_together_are_refused_by_their_headers():
    urls = [data_url(png_header(4000, 4000))] * 3
    assert "144000000 bytes" in await refused(chat(*urls), 400, "media_too_large", max_request_decoded_bytes=100 << 20)
    assert (await send(chat(*urls), max_request_decoded_bytes=144_000_000)).status == 200


async def test_messages_that_are_nested_without_end_are_refused():
    body = b'{"messages":' + b"[" * 500 + b"]" * 500 + b"}"
    await refused(body, 400, "invalid_json")


async def test_media_is_fetched_only_from_hosts_that_are_allowed():
    assert "allowed_media_domains" in await refused(chat("https://a.example/x.png"), 400, "url_not_allowed")
    allowed = {"allowed_media_domains": ["a.example"]}
    assert (await send(chat("https://a.example/x.png"), **allowed)).status == 200
    await refused(chat("https://b.example/x.png"), 400, "url_not_allowed", **allowed)
    await refused(chat("https://a.example@b.example/x.png"), 400, "url_not_allowed", **allowed)
    await refused(chat("https://a.example\\@b.example/"), 400, "invalid_url", **allowed)


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "fe80::1%eth0", "::ffff:10.0.0.1", "0.0.0.0"]
)
async def test_an_allowed_name_that_points_inside_is_refused(address):
    options = {"allowed_media_domains": ["a.example"], "resolve": lambda host: ["93.184.216.34", address]}
    await refused(chat("https://a.example/x.png"), 400, "url_not_allowed", **options)


async def test_an_allowed_name_that_does_not_resolve_is_refused():
    def resolve(host):
        raise OSError(-2, "Name or service not known")

    options = {"allowed_media_domains": ["a.example"], "resolve": resolve}
    await refused(chat("https://a.example/x.png"), 400, "url_not_allowed", **options)


async def test_films_and_sounds_follow_the_same_rules_for_addresses():
    body = {"messages": [{"content": [{"type": "video_url", "video_url": {"url": "http://10.0.0.1/a.mp4"}}]}]}
    await refused(body, 400, "url_not_allowed")


async def test_files_are_refused_unless_their_folder_is_allowed(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(picture())
    (tmp_path / "b.png").write_bytes(picture())
    (tmp_path / "in" / "link.png").symlink_to(tmp_path / "b.png")
    await refused(chat(f"file://{tmp_path}/in/a.png"), 400, "url_not_allowed")
    allowed = {"allowed_local_media_path": str(tmp_path / "in")}
    assert (await send(chat(f"file://{tmp_path}/in/a.png"), **allowed)).status == 200
    for outside in ("b.png", "in/../b.png", "in/%2e%2e/b.png", "in/link.png"):
        await refused(chat(f"file://{tmp_path}/{outside}"), 400, "url_not_allowed", **allowed)


async def test_ready_made_features_are_refused():
    await refused({"features": {"mm_hashes": {}}}, 400, "unsupported", path="/inference/v1/generate")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/media"])
async def test_a_file_whose_header_takes_for_ever_ends_its_own_request_only(path, monkeypatch):
    from epd.endpoint.media import probing

    let_go, opened = threading.Event(), probing.open_picture
    monkeypatch.setattr(probing, "open_picture", lambda content: let_go.wait(30) and opened(content))
    body = picture() if path == "/v1/media" else chat(data_url(picture()))
    try:
        answers = await asyncio.gather(
            refused(body, 400, "media_timeout", path=path, media_timeout_s=0.2), send({"messages": []})
        )
    finally:
        let_go.set()
    assert "0.2 s" in answers[0] and answers[1].status == 200


async def test_requests_without_a_body_pass():
    assert (await send(b"")).status == 200

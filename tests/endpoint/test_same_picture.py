"""One picture by every way into the endpoint: whatever it comes as, its patches have the same names.

Patches are named by the content of what the encoder is given, so equal names are equal answers.
"""

import base64
import gzip
import http.server
import io
import json
import threading

import numpy as np
import pytest
import pytest_asyncio
from PIL import Image

from epd.builtin import demo_image_path

from .fake_broker import says
from .serving import chat_body, image_url, serving, with_picture

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]
DEMO = demo_image_path().read_bytes()
UPRIGHT = Image.open(io.BytesIO(DEMO)).convert("RGB")
GREY = np.asarray(UPRIGHT.convert("L"))
ASK = {"type": "text", "text": "Read the grid."}


def saved(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


class Files(http.server.BaseHTTPRequestHandler):
    """Answers with the picture whose address is `/demo.png`."""

    def do_GET(self):
        self.send_response(302 if "inside" in self.path else 200)
        if "inside" in self.path:
            self.send_header("Location", "http://127.0.0.1:9/x")
        self.send_header("Content-Length", str(len(DEMO)))
        self.end_headers()
        self.wfile.write(DEMO)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def host():
    """Where a picture can be fetched; taken for a public host while this is used."""
    from epd.endpoint.media import addresses

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    is_public = addresses.is_public
    addresses.is_public = lambda address: address == "127.0.0.1"
    yield f"http://localhost:{server.server_port}"
    addresses.is_public = is_public
    server.shutdown()
    server.server_close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory):
    folder, allowed = tmp_path_factory.mktemp("endpoint"), tmp_path_factory.mktemp("allowed")
    (allowed / "demo.png").write_bytes(DEMO)
    options = {"allowed_media_domains": ["localhost"], "allowed_local_media_path": str(allowed)}
    async with serving(folder, script=says([100]), **options) as served:
        served.allowed = allowed
        yield served


async def patches(served, body, path="/v1/chat/completions", **options):
    """The names of the patches of the request that is sent."""
    served.broker.submits.clear()
    if isinstance(body, dict):
        body = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"} | options.pop("headers", {})
    async with served.session.post(path, data=body, headers=headers) as answer:
        assert answer.status == 200, await answer.text()
    (submit,) = served.broker.submits
    return [patch.patch_hash for patch in submit.patches]


async def names_of(served, file, kind="png"):
    """The names of a picture's patches, by a data URL in a chat."""
    return await patches(served, chat_body(with_picture(url=image_url(file, kind))))


@pytest_asyncio.fixture(loop_scope="module")
async def expected(served):
    names = await names_of(served, DEMO)
    assert len(names) > 4
    return names


def anthropic(*content):
    return {"model": "digits", "max_tokens": 4, "messages": [{"role": "user", "content": [*content, ASK]}]}


DATA = base64.b64encode(DEMO).decode()
SOURCE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": DATA}}
INPUT_IMAGE = {"type": "input_image", "image_url": image_url(), "detail": "auto"}
CHAT = chat_body(with_picture())
BODIES = {
    "utf-16": ("/v1/chat/completions", json.dumps(CHAT).encode("utf-16"), {}),
    "with a byte order mark": ("/v1/chat/completions", json.dumps(CHAT).encode("utf-8-sig"), {}),
    "gzip": ("/v1/chat/completions", gzip.compress(json.dumps(CHAT).encode()), {"Content-Encoding": "gzip"}),
    "invocations": ("/invocations", CHAT, {}),
    "stream": ("/v1/chat/completions", CHAT | {"stream": True}, {}),
    "without a type": ("/v1/chat/completions", chat_body([{"image_url": image_url()}, ASK]), {}),
    "with a uuid": ("/v1/chat/completions", chat_body([{"uuid": "x", "image_url": image_url()}, ASK]), {}),
    "in capitals": ("/v1/chat/completions", chat_body(with_picture(url="DATA:IMAGE/PNG" + image_url()[14:])), {}),
    "of another type": ("/v1/chat/completions", chat_body(with_picture(url=image_url(kind="jpeg"))), {}),
    "input_image": ("/v1/chat/completions", chat_body([INPUT_IMAGE, ASK]), {}),
    "messages": ("/v1/messages", anthropic(SOURCE), {}),
    "responses": ("/v1/responses", {"model": "digits", "max_output_tokens": 16, "input": [
        {"role": "user", "content": [INPUT_IMAGE, {"type": "input_text", "text": "Read the grid."}]}]}, {}),
}  # fmt: skip


@pytest.mark.parametrize("way", BODIES)
async def test_by_every_api_and_encoding(served, expected, way):
    path, body, headers = BODIES[way]
    assert await patches(served, body, path, headers=headers) == expected


async def test_by_an_address_a_file_and_an_upload(served, expected, host):
    for url in (f"{host}/demo.png", f"file://{served.allowed}/demo.png"):
        assert await patches(served, chat_body(with_picture(url=url))) == expected
    async with served.session.post("/v1/media", data=DEMO) as answer:
        url = f"epd-media://{(await answer.json())['id']}"
    assert await patches(served, chat_body(with_picture(url=url))) == expected


async def test_a_redirect_to_the_inside_is_not_followed(served, host):
    answer, body = await served.chat(content=with_picture(url=f"{host}/inside"))
    assert (answer.status, body["error"]["type"]) == (400, "media_not_fetched") and "302" in body["error"]["message"]


async def test_an_address_that_does_not_answer_is_the_requests_fault(served, host):
    answer, body = await served.chat(content=with_picture(url="http://localhost:9/x.png"))
    assert (answer.status, body["error"]["type"]) == (400, "media_not_fetched")


def turned(orientation):
    """A picture that is upright once it is turned as EXIF says."""
    back = {
        1: None, 2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_270,
    }[orientation]  # fmt: skip
    return UPRIGHT if back is None else UPRIGHT.transpose(back)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
async def test_a_photo_is_turned_as_its_exif_says(served, expected, kind, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    file = saved(turned(orientation), kind, exif=exif, **options)
    assert await names_of(served, file) == expected
    async with served.session.post("/v1/media", data=file) as answer:
        url = f"epd-media://{(await answer.json())['id']}"
    assert await patches(served, chat_body(with_picture(url=url))) == expected


LOSSLESS = {
    "WEBP": {"lossless": True},
    "TIFF": {},
    "BMP": {},
    "JPEG2000": {"irreversible": False},
    "ICO": {"sizes": [(256, 128)]},
}


@pytest.mark.parametrize("kind", LOSSLESS)
async def test_in_every_lossless_format(served, expected, kind):
    assert await names_of(served, saved(UPRIGHT, kind, **LOSSLESS[kind])) == expected


async def test_formats_that_lose_something_are_taken(served):
    for kind in ("AVIF", "JPEG", "GIF"):
        assert await names_of(served, saved(UPRIGHT, kind))


def wide(kind, dtype, factor, **options):
    return saved(Image.fromarray((GREY.astype(np.float64) * factor).astype(dtype)), kind, **options)


GREYS = {
    "16 bits": wide("PNG", np.uint16, 257),
    "16 bits as TIFF": wide("TIFF", np.uint16, 257),
    "16 bits as JPEG 2000": wide("JPEG2000", np.uint16, 257, irreversible=False),
    "32 bits of 16": wide("TIFF", np.int32, 257),
    "32 bits of 8": wide("TIFF", np.int32, 1),
    "real, of 8 bits": wide("TIFF", np.float32, 1),
    "real, of 0 to 1": wide("TIFF", np.float32, 1 / 255),
}


@pytest.mark.parametrize("which", GREYS)
async def test_grey_of_more_bits_is_what_it_is_in_8(served, which):
    assert await names_of(served, GREYS[which]) == await names_of(served, saved(Image.fromarray(GREY)))


async def test_grey_of_16_bits_is_turned_as_its_exif_says(served):
    exif = Image.Exif()
    exif[0x112] = 3
    image = Image.fromarray(np.rot90(GREY, 2).astype(np.uint16) * 257)
    assert await names_of(served, saved(image, exif=exif)) == await names_of(served, saved(Image.fromarray(GREY)))


@pytest.mark.parametrize("values", [np.full((8, 8), -1, np.int32), np.full((8, 8), np.nan, np.float32)], ids=str)
async def test_numbers_that_cannot_be_brightness_are_refused(served, values):
    answer, body = await served.chat(content=with_picture(url=image_url(saved(Image.fromarray(values), "TIFF"))))
    assert answer.status == 400 and "brightness" in body["error"]["message"]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "YCbCr", "LAB"])
async def test_pictures_of_every_mode_are_taken(served, mode):
    kind = "TIFF" if mode in ("CMYK", "YCbCr", "LAB") else "PNG"
    image = Image.merge("LAB", UPRIGHT.split()) if mode == "LAB" else UPRIGHT.convert(mode)
    assert await names_of(served, saved(image, kind))

"""One picture by every way into the client: what is sent decodes, as the server decodes it, to the same pixels."""

from __future__ import annotations

import base64
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from fake_endpoint import DONE, FakeEndpoint, complete, event, streamed
from PIL import Image, ImageCms, ImageOps

from epd.client import AsyncClient, Client, PictureError

GREY = Image.linear_gradient("L").rotate(37).resize((48, 32))
COLOUR = Image.merge("RGB", [GREY, GREY.transpose(Image.Transpose.ROTATE_180), Image.eval(GREY, lambda v: v ^ 90)])
ALPHA = Image.linear_gradient("L").resize((48, 32))
WITH_ALPHA = Image.merge("RGBA", [*COLOUR.split(), ALPHA])
PALETTE = COLOUR.quantize(40)
BITS = GREY.convert("1")
WIDE = np.asarray(GREY).astype(np.uint16) * 257  # and a little, so that it must be rounded
WIDE += np.where(WIDE < 65_000, 100, 0).astype(np.uint16)
ARRAY = np.asarray(COLOUR)


def decoded(url: str) -> Image.Image:
    """A picture as the server decodes it: upright; 16 bits of grey become 8, as viewers show them."""
    if url.startswith("file://"):
        content = Path(unquote(urlsplit(url).path)).read_bytes()
    else:
        content = base64.b64decode(url.partition(",")[2], validate=True)
    image = Image.open(io.BytesIO(content))
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode == "I;16":
        image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
    return image.convert("RGBA")


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def in_file(folder: Path) -> Path:
    path = folder / "a picture.png"
    path.write_bytes(png(COLOUR))
    return path


def data_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


class Here:
    """A path that is no `Path`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return str(self._path)


def zipped(folder: Path) -> Any:
    """A file that is read from a compressed stream."""
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", png(COLOUR))
    return zipfile.ZipFile(folder / "a.zip").open("a.png")


def unseekable(folder: Path) -> Any:
    """A file as pipes and sockets are."""
    file = io.BytesIO(png(COLOUR))
    return io.BufferedReader(type("Pipe", (io.RawIOBase,), {
        "readable": lambda _: True, "readinto": lambda _, into: file.readinto(into),
    })())  # fmt: skip


def premultiplied_grey() -> Image.Image:
    return Image.merge("LA", [GREY, ALPHA]).convert("La").convert("LA")


# The form of a picture, and the pixels that it must be sent as.
PICTURES: dict[str, tuple[Callable[[Path], Any], Image.Image]] = {
    "path": (in_file, COLOUR),
    "text path": (lambda folder: str(in_file(folder)), COLOUR),
    "path-like": (lambda folder: Here(in_file(folder)), COLOUR),
    "bytes": (lambda _: png(COLOUR), COLOUR),
    "bytearray": (lambda _: bytearray(png(COLOUR)), COLOUR),
    "memoryview": (lambda _: memoryview(png(COLOUR)), COLOUR),
    "open file": (lambda folder: in_file(folder).open("rb"), COLOUR),
    "BytesIO": (lambda _: io.BytesIO(png(COLOUR)), COLOUR),
    "file in a zip": (zipped, COLOUR),
    "pipe": (unseekable, COLOUR),
    "data URL": (lambda _: data_url(png(COLOUR)), COLOUR),
    "file URL": (lambda folder: in_file(folder).as_uri(), COLOUR),
    "PIL, opened": (lambda folder: Image.open(in_file(folder)), COLOUR),
    "PIL RGB": (lambda _: COLOUR, COLOUR),
    "PIL RGBA": (lambda _: WITH_ALPHA, WITH_ALPHA),
    "PIL RGBa": (lambda _: WITH_ALPHA.convert("RGBa"), WITH_ALPHA.convert("RGBa").convert("RGBA")),
    "PIL RGBX": (lambda _: COLOUR.convert("RGBX"), COLOUR),
    "PIL L": (lambda _: GREY, GREY),
    "PIL LA": (lambda _: Image.merge("LA", [GREY, ALPHA]), Image.merge("LA", [GREY, ALPHA])),
    "PIL La": (lambda _: Image.merge("LA", [GREY, ALPHA]).convert("La"), premultiplied_grey()),
    "PIL P": (lambda _: PALETTE, PALETTE),
    "PIL PA": (lambda _: PALETTE.convert("PA"), PALETTE),
    "PIL 1": (lambda _: BITS, BITS),
    "PIL CMYK": (lambda _: COLOUR.convert("CMYK"), COLOUR),
    "PIL YCbCr": (lambda _: COLOUR.convert("YCbCr"), COLOUR.convert("YCbCr").convert("RGB")),
    "PIL HSV": (lambda _: COLOUR.convert("HSV"), COLOUR.convert("HSV").convert("RGB")),
    "PIL I": (lambda _: GREY.convert("I"), GREY),
    "PIL I of 16 bits": (lambda _: Image.fromarray(WIDE.astype(np.int32)), GREY),
    "PIL I;16": (lambda _: Image.fromarray(WIDE), GREY),
    "PIL I;16B": (lambda _: Image.fromarray(WIDE.astype(">u2")), GREY),
    "PIL F": (lambda _: GREY.convert("F"), GREY),
    "PIL F from 0 to 1": (lambda _: Image.fromarray(np.asarray(GREY).astype(np.float32) / 255), GREY),
    "PIL F of 16 bits": (lambda _: Image.fromarray(WIDE.astype(np.float32)), GREY),
    "16-bit PNG": (lambda _: png(Image.fromarray(WIDE)), GREY),
    "numpy uint8": (lambda _: ARRAY, COLOUR),
    "numpy, not contiguous": (lambda _: np.asfortranarray(ARRAY[::-1])[::-1], COLOUR),
    "numpy uint8 grey": (lambda _: np.asarray(GREY), GREY),
    "numpy one channel": (lambda _: np.asarray(GREY)[:, :, None], GREY),
    "numpy uint8 with alpha": (lambda _: np.asarray(WITH_ALPHA), WITH_ALPHA),
    "numpy bool": (lambda _: np.asarray(BITS), BITS),
    "numpy float32": (lambda _: ARRAY.astype(np.float32) / 255, COLOUR),
    "numpy float64": (lambda _: ARRAY / 255, COLOUR),
    "numpy float16": (lambda _: ARRAY.astype(np.float16), COLOUR),
    "numpy float to 255": (lambda _: ARRAY.astype(np.float32), COLOUR),
    "numpy int64": (lambda _: ARRAY.astype(np.int64), COLOUR),
    "numpy int32 of 16 bits": (lambda _: ARRAY.astype(np.int32) * 257, COLOUR),
    "numpy float of 16 bits": (lambda _: ARRAY * 257.0, COLOUR),
    "numpy uint16": (lambda _: ARRAY.astype(np.uint16) * 256 + 200, COLOUR),
    "numpy uint16 grey": (lambda _: WIDE, GREY),
    "numpy uint16 grey, big-endian": (lambda _: WIDE.astype(">u2"), GREY),
}

MESSAGE: Callable[[dict[str, Any]], Any] = lambda part: [{"role": "user", "content": [part]}]  # noqa: E731
# How a picture is given to a call.
ARGUMENTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "list": lambda picture: {"prompt": "?", "images": [picture]},
    "alone": lambda picture: {"prompt": "?", "images": picture},
    "generator": lambda picture: {"prompt": "?", "images": (each for each in [picture])},
    "messages": lambda picture: {"messages": MESSAGE({"type": "image", "image": picture})},
    "messages, all generators": lambda picture: {
        "messages": iter([{"role": "user", "content": iter([{"type": "image", "image": picture}])}])
    },
}


def last_picture(endpoint: FakeEndpoint) -> Image.Image:
    [part] = [part for part in endpoint.bodies[-1]["messages"][-1]["content"] if part["type"] == "image_url"]
    return decoded(part["image_url"]["url"])


def assert_same(sent: Image.Image, expected: Image.Image) -> None:
    np.testing.assert_array_equal(np.asarray(sent), np.asarray(expected.convert("RGBA")))


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.parametrize(("make", "pixels"), PICTURES.values(), ids=PICTURES)
async def test_every_form_by_every_argument_is_sent_with_the_same_pixels(
    endpoint: FakeEndpoint,
    client: AsyncClient,
    tmp_path: Path,
    make: Callable[[Path], Any],
    pixels: Image.Image,
    arguments: Callable[[Any], dict[str, Any]],
) -> None:
    await client.generate(**arguments(make(tmp_path)))
    assert_same(last_picture(endpoint), pixels)


@pytest.mark.parametrize(("make", "pixels"), PICTURES.values(), ids=PICTURES)
def test_every_form_by_every_method_is_sent_with_the_same_pixels(
    endpoint: FakeEndpoint, tmp_path: Path, make: Callable[[Path], Any], pixels: Image.Image
) -> None:
    for reuse in (True, False):
        with Client(endpoint.url, reuse_pictures=reuse) as client:
            endpoint.answer = complete("4")
            client.generate("?", images=make(tmp_path))
            assert_same(last_picture(endpoint), pixels)
            endpoint.answer = streamed(event("4", finish="stop"), DONE)
            assert len(list(client.stream("?", images=make(tmp_path)))) == 1
            if endpoint.uploads:  # used a second time
                assert_same(decoded(data_url(endpoint.uploads.pop()[0])), pixels)
            else:
                assert_same(last_picture(endpoint), pixels)
            picture = make(tmp_path)
            if isinstance(picture, str) and ":" in picture:
                with pytest.raises(PictureError, match="is an address"):
                    client.upload(picture)
            else:
                client.upload(picture)
                assert_same(decoded(data_url(endpoint.uploads.pop()[0])), pixels)


ORIENTATIONS = range(1, 9)
PHOTOS: dict[str, Callable[[Path], Any]] = {
    "path": lambda path: path,
    "bytes": lambda path: path.read_bytes(),
    "open file": lambda path: path.open("rb"),
    "file URL": lambda path: path.as_uri(),
    "PIL, opened": Image.open,
    "PIL, loaded and closed": lambda path: loaded(path),
    "PIL, converted": lambda path: Image.open(path).convert("RGBA"),
    "PIL, turned already": lambda path: ImageOps.exif_transpose(Image.open(path)),
    "numpy of what was turned": lambda path: np.asarray(ImageOps.exif_transpose(Image.open(path))),
}


def loaded(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
    return image


@pytest.mark.parametrize("make", PHOTOS.values(), ids=PHOTOS)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "JPEG"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
async def test_a_photo_stands_upright_by_every_way_in(
    endpoint: FakeEndpoint, client: AsyncClient, tmp_path: Path, make: Any, kind: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "photo"
    COLOUR.save(path, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    upright = decoded(path.as_uri())
    assert upright.size == ((48, 32) if orientation < 5 else (32, 48))
    await client.generate("?", images=[make(path)])
    assert_same(last_picture(endpoint), upright)
    if make is not PHOTOS["file URL"]:
        await client.upload(make(path))
        assert_same(decoded(data_url(endpoint.uploads[-1][0])), upright)
    if orientation > 1:
        COLOUR.save(path, kind, **({"lossless": True} if kind == "WEBP" else {}))
        await client.generate("?", images=[make(path)])
        assert_same(last_picture(endpoint), decoded(path.as_uri()))


async def test_pictures_that_differ_only_in_their_orientation_are_not_taken_for_each_other(
    endpoint: FakeEndpoint, client: AsyncClient
) -> None:
    for orientation in (1, 3, 6, 8):
        image = COLOUR.copy()
        image.getexif()[0x0112] = orientation
        await client.generate("?", images=[image])
        assert_same(last_picture(endpoint), ImageOps.exif_transpose(image))
    assert endpoint.uploads == []


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("broken", [b"Exif\0\0garbage", b"", b"Exif\0\0II*\0\xff\xff\xff\xff"])
async def test_an_orientation_that_cannot_be_read_says_nothing(
    endpoint: FakeEndpoint, client: AsyncClient, broken: bytes
) -> None:
    image = COLOUR.copy()
    image.info["exif"] = broken
    await client.generate("?", images=[image])
    assert_same(last_picture(endpoint), COLOUR)


async def test_the_frame_of_an_animation_that_was_chosen_is_the_one_that_is_sent(
    endpoint: FakeEndpoint, client: AsyncClient
) -> None:
    file = io.BytesIO()
    COLOUR.save(file, "PNG", save_all=True, append_images=[ImageOps.mirror(COLOUR), ImageOps.flip(COLOUR)])
    animation = Image.open(file)
    for number, frame in ((0, COLOUR), (2, ImageOps.flip(COLOUR))):
        animation.seek(number)
        await client.generate("?", images=[animation])
        assert_same(last_picture(endpoint), frame)


async def test_transparency_of_a_palette_and_of_a_colour_is_kept(endpoint: FakeEndpoint, client: AsyncClient) -> None:
    for mode, transparency in (("P", 3), ("P", bytes(range(200, 240))), ("RGB", (0, 0, 0)), ("L", 9)):
        image = {"P": PALETTE, "RGB": COLOUR, "L": GREY}[mode].copy()
        image.info["transparency"] = transparency
        await client.generate("?", images=[image])
        assert_same(last_picture(endpoint), Image.open(io.BytesIO(png(image))))


NO_PICTURES: dict[str, tuple[Any, str]] = {
    "numbers above 65535": (np.full((4, 4), 70000.0), "0 to 1, 0 to 255 or 0 to 65535"),
    "numbers below 0": (np.full((4, 4), -0.5), "0 to 1, 0 to 255 or 0 to 65535"),
    "NaN": (np.array([[0.0, np.nan]] * 2), "0 to 1, 0 to 255 or 0 to 65535"),
    "infinity": (np.array([[0.0, np.inf]] * 2), "0 to 1, 0 to 255 or 0 to 65535"),
    "whole numbers below 0": (np.full((4, 4), -1), "0 to 255 or 0 to 65535"),
    "int8 below 0": (np.full((4, 4), -1, np.int8), "0 to 255 or 0 to 65535"),
    "whole numbers above 65535": (np.full((4, 4), 65536), "0 to 255 or 0 to 65535"),
    "channels first": (np.zeros((3, 20, 20), np.uint8), r"shape \(3, 20, 20\)"),
    "five channels": (np.zeros((20, 20, 5), np.uint8), r"shape \(20, 20, 5\)"),
    "a row": (np.zeros(20, np.uint8), r"shape \(20,\)"),
    "a number": (np.float64(3), r"shape \(\)"),
    "nothing": (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"),
    "complex": (np.zeros((4, 4), np.complex64), "not ndarray"),
    "PIL F above 65535": (Image.fromarray(np.full((4, 4), 70000, np.float32)), "0 to 1, 0 to 255 or 0 to 65535"),
    "PIL F with NaN": (Image.fromarray(np.array([[0, np.nan]] * 2, np.float32)), "0 to 1, 0 to 255 or 0 to 65535"),
    "PIL F with infinity": (Image.fromarray(np.array([[0, np.inf]] * 2, np.float32)), "0 to 1, 0 to 255 or 0 to 65535"),
    "PIL I below 0": (Image.fromarray(np.full((4, 4), -1, np.int32)), "0 to 255 or 0 to 65535"),
    "PIL without pixels": (Image.new("RGB", (0, 4)), "cannot"),
    "a text file": (io.StringIO("x"), "binary mode"),
    "an empty file": (io.BytesIO(), "at its end"),
}


@pytest.mark.parametrize(("picture", "message"), NO_PICTURES.values(), ids=NO_PICTURES)
async def test_what_has_no_pixels_that_are_sure_is_refused_and_nothing_is_sent(
    endpoint: FakeEndpoint, client: AsyncClient, picture: Any, message: str
) -> None:
    with pytest.raises(PictureError, match=message):
        await client.generate("?", images=[picture])
    with pytest.raises(PictureError, match=message):
        await client.upload(picture)
    assert endpoint.bodies == endpoint.uploads == []


async def test_a_batch_is_its_pictures(endpoint: FakeEndpoint, client: AsyncClient) -> None:
    await client.generate("?", images=np.stack([ARRAY, ARRAY[:, ::-1]]))
    urls = [part["image_url"]["url"] for part in endpoint.bodies[0]["messages"][0]["content"][:-1]]
    for url, pixels in zip(urls, (COLOUR, ImageOps.mirror(COLOUR)), strict=True):
        assert_same(decoded(url), pixels)


async def test_an_open_file_can_be_given_again_and_is_read_from_where_it_stands(
    endpoint: FakeEndpoint, client: AsyncClient
) -> None:
    file = io.BytesIO(b"before" + png(COLOUR))
    file.seek(6)
    for _ in range(2):
        await client.generate("?", images=file)
    assert file.tell() == 6
    assert [content for content, _ in endpoint.uploads] == [png(COLOUR)], "the second time"
    file.seek(0, io.SEEK_END)
    with pytest.raises(PictureError, match=r"seek\(0\)"):
        await client.generate("?", images=file)


async def test_lab_is_sent_as_the_colours_it_stands_for(endpoint: FakeEndpoint, client: AsyncClient) -> None:
    to_lab = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    lab = ImageCms.applyTransform(COLOUR, to_lab)
    assert lab is not None and lab.mode == "LAB"
    await client.generate("?", images=[lab])
    difference = np.asarray(last_picture(endpoint)).astype(int) - np.asarray(COLOUR.convert("RGBA"))
    assert np.abs(difference).mean() < 2, "LAB of 8 bits is coarse"

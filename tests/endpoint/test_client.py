"""The Python client beside what answers it: vLLM's fields, and the pixels that the endpoint sees of its pictures."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from epd.client.arguments import OF_THE_CLIENT, Arguments
from epd.client.pictures import LocalPicture
from epd.endpoint.media.pictures import PictureIO


def test_the_client_takes_the_fields_of_vllms_chat_request() -> None:
    sent = set(Arguments.__annotations__) - OF_THE_CLIENT
    fields = set(ChatCompletionRequest.model_fields)
    assert sent | {"messages", "stream", "logprobs"} == fields, "vLLM has other fields now: change `Arguments`"


GREY = Image.linear_gradient("L").rotate(37).resize((48, 32))
COLOUR = Image.merge("RGB", [GREY, GREY.transpose(Image.Transpose.ROTATE_180), Image.eval(GREY, lambda v: v ^ 90)])
RANDOM = np.random.default_rng(0)
WIDE = RANDOM.integers(0, 65536, (32, 48), np.uint16)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def transparent() -> Image.Image:
    image = COLOUR.quantize(30)
    image.info["transparency"] = 4
    return image


# A picture, how it is saved, and with what.
FILES: dict[str, tuple[Callable[[], Image.Image], str, dict[str, Any]]] = {
    "RGB": (lambda: COLOUR, "PNG", {}),
    "RGBA": (lambda: Image.merge("RGBA", [*COLOUR.split(), GREY]), "PNG", {}),
    "grey": (lambda: GREY, "PNG", {}),
    "grey with alpha": (lambda: Image.merge("LA", [GREY, GREY]), "PNG", {}),
    "two colours": (lambda: GREY.convert("1"), "PNG", {}),
    "palette": (lambda: COLOUR.quantize(30), "PNG", {}),
    "palette with a transparent colour": (transparent, "PNG", {"transparency": 4}),
    "GIF with a transparent colour": (transparent, "GIF", {"transparency": 4}),
    "GIF with frames": (lambda: COLOUR, "GIF", {"save_all": True, "append_images": [GREY]}),
    "CMYK": (lambda: COLOUR.convert("CMYK"), "JPEG", {}),
    "LAB": (lambda: COLOUR.convert("LAB"), "TIFF", {}),
    "JPEG": (lambda: COLOUR, "JPEG", {}),
    "WebP": (lambda: COLOUR, "WEBP", {}),
    "AVIF": (lambda: COLOUR, "AVIF", {}),
    "JPEG 2000": (lambda: COLOUR, "JPEG2000", {}),
    "ICO": (lambda: COLOUR, "ICO", {}),
    "BMP": (lambda: COLOUR, "BMP", {}),
    "16 bits": (lambda: Image.fromarray(WIDE), "PNG", {}),
    "16 bits, TIFF": (lambda: Image.fromarray(WIDE), "TIFF", {}),
    "16 bits, big-endian": (lambda: Image.fromarray(WIDE.astype(">u2")), "TIFF", {}),
    "32 bits up to 255": (lambda: Image.fromarray((WIDE // 257).astype(np.int32)), "TIFF", {}),
    "32 bits up to 65535": (lambda: Image.fromarray(WIDE.astype(np.int32)), "TIFF", {}),
    "real, up to 1": (lambda: Image.fromarray(RANDOM.random((32, 48), np.float32)), "TIFF", {}),
    "real, up to 255": (lambda: Image.fromarray(RANDOM.random((32, 48), np.float32) * 255), "TIFF", {}),
    "real, up to 65535": (lambda: Image.fromarray(RANDOM.random((32, 48), np.float32) * 65535), "TIFF", {}),
    **{
        f"{kind}, turned {orientation}": (lambda: COLOUR, kind, {"exif": turned(orientation)})
        for kind in ("JPEG", "PNG", "WEBP", "TIFF")
        for orientation in range(1, 9)
    },
}


@pytest.mark.parametrize(("make", "kind", "options"), FILES.values(), ids=FILES)
def test_the_endpoint_sees_the_same_pixels_of_a_file_and_of_that_file_opened_by_pillow(
    make: Callable[[], Image.Image], kind: str, options: dict[str, Any]
) -> None:
    saved = io.BytesIO()
    make().save(saved, kind, **options)
    opened = LocalPicture(Image.open(saved))
    opened.load()
    by_file, by_image = (PictureIO().decode(file) for file in (saved.getvalue(), opened.file()))
    assert (by_file.mode, by_file.size) == (by_image.mode, by_image.size)
    np.testing.assert_array_equal(np.asarray(by_file), np.asarray(by_image))


def test_the_endpoint_sees_the_same_pixels_of_an_array_as_of_its_file() -> None:
    saved = io.BytesIO()
    Image.fromarray(WIDE).save(saved, "PNG")
    array = LocalPicture(WIDE)
    array.load()
    np.testing.assert_array_equal(PictureIO().decode(saved.getvalue()), PictureIO().decode(array.file()))

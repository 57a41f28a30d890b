"""Formats that people send beside the usual: what is taken, within which bounds, and what is named in a refusal."""

import io
import struct

import av
import numpy as np
import pytest
from PIL import Image

from epd.config import EndpointConfig
from epd.endpoint.http.refusals import RefusedError
from epd.endpoint.media import probing
from epd.multimodal import containers
from tests import media_files as files

from .test_limits import png_header


def adts(seconds=1.0):
    """Raw AAC."""
    file = io.BytesIO()
    with av.open(file, "w", format="adts") as container:
        stream = container.add_stream("aac", rate=files.RATE, layout="mono")
        wave = files.samples(seconds)[None]
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        frame.sample_rate = files.RATE
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


def amr(count=50):
    """AMR of 12.2 kbit/s: so many frames of 20 ms of some sound."""
    random = np.random.default_rng(0)
    frames = [b"\x3c" + random.integers(0, 256, 31, dtype=np.uint8).tobytes() for _ in range(count)]
    return b"#!AMR\n" + b"".join(frames)


def icon(*pictures):
    """A Windows icon whose table says that each picture in it has 16 x 16 pixels."""
    at, table = 6 + 16 * len(pictures), b""
    for each in pictures:
        table += struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 32, len(each), at)
        at += len(each)
    return b"\0\0\1\0" + struct.pack("<H", len(pictures)) + table + b"".join(pictures)


def bitmap(width, height):
    return struct.pack("<IiiHHIIiiII", 40, width, height, 1, 32, 0, 0, 0, 0, 0, 0)


def refused(check, content, code, **config):
    with pytest.raises(RefusedError) as error:
        check(content, EndpointConfig(**config))
    assert (error.value.failure.status, error.value.failure.code) == (400, code)
    return str(error.value)


@pytest.mark.parametrize(("kind", "content"), [("aac", adts()), ("amr", amr())], ids=["aac", "amr"])
def test_raw_sounds_are_known_by_their_first_bytes(kind, content):
    assert containers.kind_of(content) == kind
    assert probing.check_audio(content, EndpointConfig()) > 0
    refused(probing.check_audio, content, "audio_too_long", max_audio_s=0.5)


@pytest.mark.engine
@pytest.mark.parametrize("content", [adts(), amr()], ids=["aac", "amr"])
def test_raw_sounds_are_decoded(content):
    from epd.endpoint.media.decoding import AudioIO

    samples, rate = AudioIO(EndpointConfig()).load_bytes(content)
    assert 0.9 < len(samples) / rate < 1.2 and np.abs(samples).max() > 0


@pytest.mark.parametrize(
    "content", [b"\xff\xf1" + b"x" * 99, b"\xff\xf1\x50\x80", b"#!AMR", b"\xff\xf1\x50\x80\x00\x1f\xfc"]
)
def test_what_only_begins_like_a_raw_sound_is_none(content):
    refused(probing.check_audio, content, "invalid_audio")


@pytest.mark.parametrize("kind", ["AVIF", "JPEG2000", "ICO"])
def test_pictures_of_these_formats_have_the_bounds_of_all(kind):
    file = io.BytesIO()
    Image.new("RGB", (64, 32)).save(file, kind, **({"sizes": [(64, 32)]} if kind == "ICO" else {}))
    assert probing.check_image(file.getvalue(), EndpointConfig()) == 64 * 32 * 3
    refused(probing.check_image, file.getvalue(), "image_too_large", max_pixels=64 * 32 - 1)
    refused(probing.check_image, file.getvalue()[:20], "invalid_image")


@pytest.mark.parametrize(
    "content",
    [icon(png_header(30_000, 30_000)), icon(bitmap(30_000, 60_000)), icon(bitmap(16, 32), png_header(5000, 5000)),
     icon(bitmap(-30_000, -60_000)), icon(*[bitmap(16, 32)] * 100, png_header(2000, 2000))],
    ids=["png", "bitmap", "the second", "upside down", "the last of many"],
)  # fmt: skip
def test_an_icon_is_as_large_as_the_pictures_in_it(content):
    refused(probing.check_image, content, "image_too_large")


NAMES = {
    b"%PDF-1.7": "PDF", b"<svg xmlns=": "SVG", b"8BPS\0\1": "PSD", b"\0\0\0\x18ftypheic\0\0": "HEIC",
    b"\xff\x0aabc": "JPEG XL", b"RIFF\0\0\0\0WAVEfmt ": "WAV", b"fLaC": "FLAC", b"PK\3\4": "ZIP",
    b"\x1f\x8b\x08": "gzip",
}  # fmt: skip


@pytest.mark.parametrize("start", NAMES, ids=NAMES.values())
def test_a_refusal_names_the_format_that_a_file_begins_as(start):
    content = start + b"\0" * 100
    assert NAMES[start] in refused(probing.check_image, content, "invalid_image")
    if start[4:8] != b"ftyp":  # which films begin with, too
        assert NAMES[start] in refused(probing.check_video, content, "invalid_video")


def test_a_refusal_of_what_nobody_knows_names_what_is_taken():
    message = refused(probing.check_image, b"nothing of the kind", "invalid_image")
    assert all(kind in message for kind in probing.IMAGE_FORMATS)


def filmed(degrees):
    """A film with frames that are to be turned by so much, as phones write them."""
    content = bytearray(files.video("mp4"))
    at = content.index(b"tkhd") + 4 + (52 if content[content.index(b"tkhd") + 4] else 40)
    across, down = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    one = 1 << 16
    content[at : at + 36] = struct.pack(">9i", across * one, down * one, 0, -down * one, across * one, 0, 0, 0, 1 << 30)
    return bytes(content)


@pytest.mark.engine
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_a_film_is_turned_as_its_container_says(degrees):
    from vllm.multimodal.media.image import ImageMediaIO

    from epd.endpoint.media.decoding import VideoIO

    def frames(content):
        return np.asarray(VideoIO(ImageMediaIO(), EndpointConfig(), num_frames=4).load_bytes(content).media[0]).astype(
            int
        )

    expected = np.rot90(frames(files.video("mp4")), -degrees // 90, axes=(1, 2))
    found = frames(filmed(degrees))
    assert found.shape == expected.shape and np.abs(found - expected).mean() < 3

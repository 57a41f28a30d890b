"""Reads the headers of media files and refuses those that nobody should decode.

Lives in the endpoint process, mostly in threads; pure. Nothing is decoded here but what FFmpeg must to know a stream's
size: pictures by Pillow, videos and the sound in them by PyAV, other sounds by libsndfile. A video's packets are
counted, since headers lie. What the decoders find is checked again while they decode (`decoding.py`).
"""

from __future__ import annotations

import binascii
import io
import itertools
from base64 import b64decode
from typing import Any

import av
import soundfile  # type: ignore[import-untyped]
from PIL import Image

from epd.config import EndpointConfig
from epd.endpoint.http.refusals import RefusedError
from epd.errors import ErrorCode
from epd.multimodal import containers

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "ICO")
JPEG_FRAMES = "video/jpeg"
MIN_RATE, MAX_RATE = 1_000, 384_000
MAX_CHANNELS = 16

# A video may have as many frames, and as many pixels in total, as `max_video_s` seconds of these.
_MAX_FPS = 60
_PIXELS_PER_S = 30 * 1920 * 1080
BYTES_PER_PIXEL, _BYTES_PER_SAMPLE = 3, 4
_OPEN_S = 10.0
# Pillow decodes an icon to open it, so it must not be larger than icons are.
_MAX_ICON_PIXELS = 1 << 20


def open_picture(content: bytes) -> Image.Image:
    """A picture's header, by the decoder of one of `IMAGE_FORMATS`."""
    return Image.open(io.BytesIO(content), formats=IMAGE_FORMATS)


def check_image(content: bytes, config: EndpointConfig) -> int:
    """Reads the header of an image file, never its pixels; returns how many bytes these take.

    Raises:
        RefusedError: the format is unknown, or the picture is empty or too large.
    """
    for width, height in containers.icon_sizes(content):
        _check_size("image", width, height, min(config.max_pixels, _MAX_ICON_PIXELS))
    try:
        with open_picture(content) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        raise RefusedError(ErrorCode.IMAGE_TOO_LARGE, "the image has too many pixels") from None
    except Exception:  # a decoder may raise anything on hostile bytes
        text = f"{_found('image', content)}not one of {', '.join(IMAGE_FORMATS)}, or damaged"
        raise RefusedError(ErrorCode.INVALID_IMAGE, text) from None
    _check_size("image", width, height, config.max_pixels)
    return width * height * BYTES_PER_PIXEL


def _found(what: str, content: bytes) -> str:
    name = containers.name_of(content)
    return f"the {what} is {name} by its first bytes, " if name else f"the {what} is "


def _check_size(what: str, width: int, height: int, most: int) -> None:
    size = f"the {what} has {width} x {height} pixels"
    if width < 1 or height < 1:
        raise RefusedError(ErrorCode(f"invalid_{what}"), size)
    if width * height > most:
        raise RefusedError(ErrorCode(f"{what}_too_large"), f"{size}; at most {most} are accepted")


def check_video(content: bytes, config: EndpointConfig) -> int:
    """Reads the header of a video file and counts its packets; returns how many bytes one frame takes.

    Raises:
        RefusedError: the format is unknown, or the file is damaged, without frames, too large or too long.
    """
    kind = containers.kind_of(content)
    if kind not in containers.VIDEO:
        found = _found("video", content)
        raise RefusedError(ErrorCode.INVALID_VIDEO, f"{found}not MP4, MOV, WebM, Matroska, AVI or GIF")
    if containers.is_truncated(kind, content):
        raise RefusedError(ErrorCode.INVALID_VIDEO, "the video is truncated: its container says that it is longer")
    try:
        with _opened(content, max_pixels=config.max_video_pixels) as container:
            if not container.streams.video:
                raise RefusedError(ErrorCode.INVALID_VIDEO, "the file has no video in it")
            stream = container.streams.video[0]
            _check_film(container, stream, config)
            return int(stream.width * stream.height * BYTES_PER_PIXEL)
    except RefusedError:
        raise
    except Exception as error:
        raise RefusedError(ErrorCode.INVALID_VIDEO, f"the video is damaged: {_words(error)}") from None


def check_frames(data: str, config: EndpointConfig) -> int:
    """Checks the contents of a `video/jpeg` data URL: JPEG files in base64, separated by commas.

    Returns:
        How many bytes they take when decoded.

    Raises:
        RefusedError: there are too many, or one of them is not a picture or too large.
    """
    files = data.split(",", config.max_video_frames)
    if len(files) > config.max_video_frames:
        raise _too_many_frames(config)
    sizes = set()
    for file in files:
        try:
            content = b64decode(file, validate=True)
        except (binascii.Error, ValueError):
            raise RefusedError(ErrorCode.INVALID_VIDEO, "a frame is not valid base64") from None
        check_image(content, config)
        with open_picture(content) as image:
            sizes.add(image.size)
    if len(sizes) > 1:
        raise RefusedError(ErrorCode.INVALID_VIDEO, f"the frames are of {len(sizes)} different sizes")
    ((width, height),) = sizes
    check_sampled(width, height, len(files), config)
    return width * height * len(files) * BYTES_PER_PIXEL


def check_sampled(width: int, height: int, num_frames: int, config: EndpointConfig) -> None:
    """Checks what is to be decoded of a video.

    Raises:
        RefusedError: that is nothing, or too much.
    """
    _check_size("video", width, height, config.max_video_pixels)
    if num_frames < 1:
        raise RefusedError(ErrorCode.INVALID_VIDEO, "there are no frames in the video")
    if num_frames > config.max_video_frames:
        raise _too_many_frames(config)
    if width * height * num_frames * BYTES_PER_PIXEL > config.max_decoded_bytes:
        text = f"{num_frames} frames of {width} x {height} pixels take more than {config.max_decoded_bytes} bytes"
        raise RefusedError(ErrorCode.VIDEO_TOO_LARGE, text)


def check_length(num_frames: int, duration_s: float, config: EndpointConfig) -> None:
    """Checks how long a video is.

    Raises:
        RefusedError: it is too long, or that is unknown.
    """
    if not duration_s > 0 or num_frames < 1:
        text = "the video does not say how long it is; rewrite it (ffmpeg -i IN -c copy OUT)"
        raise RefusedError(ErrorCode.INVALID_VIDEO, text)
    limit = config.max_video_s
    if duration_s > limit or num_frames > limit * _MAX_FPS:
        text = f"the video has {num_frames} frames in {duration_s:.1f} s; at most {limit:g} s are accepted"
        raise RefusedError(ErrorCode.VIDEO_TOO_LONG, text)


def check_audio(content: bytes, config: EndpointConfig) -> int:
    """Reads the header of a sound file; returns how many bytes its samples take.

    Raises:
        RefusedError: the format is unknown, or the file is damaged, without sound, too long or too large.
    """
    kind = containers.kind_of(content)
    if kind not in containers.AUDIO:
        known = "WAV, FLAC, MP3, AAC, AMR, Ogg, AIFF, AU, CAF, MP4 or WebM"
        raise RefusedError(ErrorCode.INVALID_AUDIO, f"{_found('audio', content)}not {known}")
    if containers.is_truncated(kind, content):
        raise RefusedError(ErrorCode.INVALID_AUDIO, "the audio is truncated: its container says that it is longer")
    try:
        if kind in containers.BY_FFMPEG:
            length, rate, channels = _sound_in(content)
        else:
            with soundfile.SoundFile(io.BytesIO(content)) as file:
                length, rate, channels = file.frames, file.samplerate, file.channels
    except RefusedError:
        raise
    except Exception as error:
        raise RefusedError(ErrorCode.INVALID_AUDIO, f"the audio is damaged: {_words(error)}") from None
    check_sound(length, rate, channels, config)
    return length * channels * _BYTES_PER_SAMPLE


def check_sound(num_samples: int, rate: float, channels: int, config: EndpointConfig) -> None:
    """Checks `num_samples` of sound for each of `channels`, at `rate` a second.

    Raises:
        RefusedError: it is empty, too long or too large, or its rate or number of channels makes no sense.
    """
    if not MIN_RATE <= rate <= MAX_RATE:
        text = f"the audio has {rate:g} samples a second; {MIN_RATE} to {MAX_RATE} are accepted"
        raise RefusedError(ErrorCode.INVALID_AUDIO, text)
    if not 1 <= channels <= MAX_CHANNELS:
        raise RefusedError(
            ErrorCode.INVALID_AUDIO, f"the audio has {channels} channels; 1 to {MAX_CHANNELS} are accepted"
        )
    if num_samples < 1:
        raise RefusedError(ErrorCode.INVALID_AUDIO, "there is no sound in the audio: its length is zero")
    if num_samples > config.max_audio_s * rate:
        text = f"the audio is {num_samples / rate:.1f} s long; at most {config.max_audio_s:g} s are accepted"
        raise RefusedError(ErrorCode.AUDIO_TOO_LONG, text)
    if num_samples * channels * _BYTES_PER_SAMPLE > config.max_decoded_bytes:
        text = f"{num_samples} samples of {channels} channels take more than {config.max_decoded_bytes} bytes"
        raise RefusedError(ErrorCode.AUDIO_TOO_LARGE, text)


def _check_film(container: Any, stream: Any, config: EndpointConfig) -> None:
    if stream.width < 1 or stream.height < 1:
        text = f"the video's frames have no size, or more than {config.max_video_pixels} pixels"
        raise RefusedError(ErrorCode.INVALID_VIDEO, text)
    check_sampled(stream.width, stream.height, 1, config)
    duration_s = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
    claimed = stream.frames or int(duration_s * float(stream.average_rate or 0))
    check_length(max(claimed, 1), duration_s, config)
    pixels = stream.width * stream.height
    limit = int(config.max_video_s * min(_MAX_FPS, _PIXELS_PER_S / pixels))
    packets = (packet for packet in container.demux(stream) if packet.size)
    count = sum(1 for _ in itertools.islice(packets, limit + 1))
    if count < 1:
        raise RefusedError(ErrorCode.INVALID_VIDEO, "there are no frames in the video")
    if count > limit:
        text = (
            f"the video has more than {limit} frames of {stream.width} x {stream.height} pixels: more to decode"
            f" than {config.max_video_s:g} s of full HD"
        )
        raise RefusedError(ErrorCode.VIDEO_TOO_LONG, text)


def _sound_in(content: bytes) -> tuple[int, int, int]:
    """The (samples, samples a second, channels) that a container's header claims; one sample if it does not say."""
    with _opened(content) as container:
        if not container.streams.audio:
            raise RefusedError(ErrorCode.INVALID_AUDIO, "the file has no audio in it")
        stream = container.streams.audio[0]
        duration_s = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
        return max(int(duration_s * stream.rate), 1), stream.rate, stream.channels


def _opened(content: bytes, **options: int) -> Any:
    """The file as FFmpeg's demultiplexers see it; `options` are those of the first stream's decoder."""
    of_stream: Any = [{name: str(value) for name, value in options.items()}]
    return av.open(io.BytesIO(content), stream_options=of_stream, timeout=_OPEN_S, io_open=_no_further_file)


def _no_further_file(*_: Any) -> Any:
    raise PermissionError("the file refers to another one")


def _too_many_frames(config: EndpointConfig) -> RefusedError:
    return RefusedError(ErrorCode.TOO_MANY_FRAMES, f"more than {config.max_video_frames} frames of one video")


def _words(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__)[:200]

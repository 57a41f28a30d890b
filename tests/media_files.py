"""Files of every format that people send, made on the spot: pictures, sounds and films, whole and broken.

Only PyAV, soundfile, Pillow and numpy; the same arguments give the same content.
"""

from __future__ import annotations

import base64
import functools
import io
import struct
from typing import Any

import av
import numpy as np
import soundfile
from PIL import Image

RATE = 16_000
VIDEO_CODECS = {"mp4": "libx264", "mov": "libx264", "webm": "libvpx-vp9", "mkv": "libx264", "avi": "mpeg4"}
AUDIO_SUBTYPES = {"wav": "PCM_16", "flac": "PCM_16", "mp3": "MPEG_LAYER_III", "ogg": "VORBIS", "aiff": "PCM_16"}
MIME = {"mp3": "mpeg", "mov": "quicktime", "mkv": "x-matroska", "avi": "x-msvideo"}


def frames(count: int, seed: int = 0, size: tuple[int, int] = (96, 64)) -> list[Image.Image]:
    """So many frames of a film in which everything moves; no two frames, and no two seeds, look alike."""
    width, height = size
    random = np.random.default_rng(seed)
    across, down = np.meshgrid(np.arange(width), np.arange(height))
    speed = random.uniform(2, 9, 3)
    phase = random.uniform(0, 6, 3)
    shots = []
    for i in range(count):
        waves = [
            127 + 120 * np.sin(across / (5 + 3 * c) + speed[c] * i / 3 + phase[c] + down / (7 + c)) for c in range(3)
        ]
        shots.append(Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8)))
    return shots


@functools.cache
def video(
    kind: str = "mp4",
    count: int = 12,
    fps: int = 6,
    seed: int = 0,
    size: tuple[int, int] = (96, 64),
    live: bool = False,
    **options: Any,
) -> bytes:
    """A film of `count` frames in a container of this kind; one that is `live` does not know its length.

    `options` go to the codec. Encoders do not give the same bytes each time, so each film is made once.
    """
    file = io.BytesIO()
    formats = {"mkv": "matroska"}
    of_container = {"live": "1"} if live else {}
    with av.open(file, "w", format=formats.get(kind, kind), options=of_container) as container:
        stream = container.add_stream(VIDEO_CODECS[kind], rate=fps, options={k: str(v) for k, v in options.items()})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.thread_count = 1
        for shot in frames(count, seed, size):
            container.mux(stream.encode(av.VideoFrame.from_image(shot)))
        container.mux(stream.encode(None))
    return file.getvalue()


def samples(seconds: float, seed: int = 0, rate: int = RATE) -> np.ndarray:
    """A sound: a few tones and some noise; float32 of shape (samples,), between -1 and 1."""
    random = np.random.default_rng(seed)
    t = np.arange(int(seconds * rate)) / rate
    tones = sum(np.sin(2 * np.pi * f * t + p) for f, p in zip(random.uniform(90, 3000, 4), range(4), strict=True))
    wave: np.ndarray = (0.15 * tones + 0.05 * random.standard_normal(len(t))).astype(np.float32)
    return wave


def audio(kind: str = "wav", seconds: float = 1.0, seed: int = 0, rate: int = RATE, channels: int = 1) -> bytes:
    """A sound in a file of this kind; "m4a" and "webm" are made by PyAV, the others by soundfile."""
    wave = samples(seconds, seed, rate)
    if kind in ("m4a", "webm"):
        return _audio_by_av(kind, wave, rate)
    return sound_file(np.stack([wave] * channels, axis=-1), kind.upper(), AUDIO_SUBTYPES[kind], rate)


def sound_file(wave: np.ndarray, kind: str, subtype: str, rate: int = RATE) -> bytes:
    """Samples (n,) or (n, channels) as a file."""
    file = io.BytesIO()
    soundfile.write(file, wave, rate, format=kind, subtype=subtype)
    return file.getvalue()


def sound_and_film(seconds: float = 1.0) -> bytes:
    """An mp4 with a film and a sound."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        film = container.add_stream("libx264", rate=6)
        film.width, film.height, film.pix_fmt = 96, 64, "yuv420p"
        sound = container.add_stream("aac", rate=RATE)
        for shot in frames(int(6 * seconds)):
            container.mux(film.encode(av.VideoFrame.from_image(shot)))
        _mux_sound(container, sound, samples(seconds), RATE)
        container.mux(film.encode(None))
    return file.getvalue()


def picture(kind: str = "png", seed: int = 0, size: tuple[int, int] = (96, 64), count: int = 1) -> bytes:
    """A picture; of more than one frame for gif and webp."""
    file = io.BytesIO()
    first, *others = frames(count, seed, size)
    first.save(file, kind, **({"save_all": True, "append_images": others} if others else {}))
    return file.getvalue()


def jpeg_frames(count: int, seed: int = 0, size: tuple[int, int] = (96, 64)) -> str:
    """VLLM's `video/jpeg` data URL: frames as base64, with commas between."""
    shots = []
    for shot in frames(count, seed, size):
        file = io.BytesIO()
        shot.save(file, "JPEG")
        shots.append(base64.b64encode(file.getvalue()).decode())
    return "data:video/jpeg;base64," + ",".join(shots)


def wav_header(seconds: float, rate: int = RATE, channels: int = 1, bits: int = 16, body: bytes = b"\0\0" * 8) -> bytes:
    """A WAV that claims to be that long and holds hardly anything."""
    frame = channels * bits // 8
    claimed = min(int(seconds * rate) * frame, 0xFFFF_FF00)
    form = struct.pack("<HHIIHH", 1, channels, rate, min(rate * frame, 0xFFFF_FFFF), frame, bits)
    chunks = b"fmt " + struct.pack("<I", len(form)) + form + b"data" + struct.pack("<I", claimed) + body
    return b"RIFF" + struct.pack("<I", min(claimed + 36, 0xFFFF_FFFF)) + b"WAVE" + chunks


def data_url(content: bytes, kind: str) -> str:
    """A data URL, e.g. of kind "video/mp4"."""
    major, _, minor = kind.partition("/")
    return f"data:{major}/{MIME.get(minor, minor)};base64,{base64.b64encode(content).decode()}"


def video_part(content: bytes | str, kind: str = "mp4") -> dict[str, Any]:
    """A film as a content part; a string is an address."""
    url = content if isinstance(content, str) else data_url(content, f"video/{kind}")
    return {"type": "video_url", "video_url": {"url": url}}


def audio_part(content: bytes | str, kind: str = "wav") -> dict[str, Any]:
    """A sound as an `audio_url` part; a string is an address."""
    url = content if isinstance(content, str) else data_url(content, f"audio/{kind}")
    return {"type": "audio_url", "audio_url": {"url": url}}


def input_audio(content: bytes, kind: str = "wav") -> dict[str, Any]:
    """A sound as an `input_audio` part."""
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(content).decode(), "format": kind}}


def image_part(content: bytes | str, kind: str = "png") -> dict[str, Any]:
    """A picture as a content part; a string is an address."""
    url = content if isinstance(content, str) else data_url(content, f"image/{kind}")
    return {"type": "image_url", "image_url": {"url": url}}


def text_part(text: str) -> dict[str, Any]:
    """Text as a content part."""
    return {"type": "text", "text": text}


def _audio_by_av(kind: str, wave: np.ndarray, rate: int) -> bytes:
    file = io.BytesIO()
    codec, container_kind = {"m4a": ("aac", "mp4"), "webm": ("libopus", "webm")}[kind]
    with av.open(file, "w", format=container_kind) as container:
        _mux_sound(container, container.add_stream(codec, rate=rate), wave, rate)
    return file.getvalue()


def _mux_sound(container: Any, stream: Any, wave: np.ndarray, rate: int) -> None:
    frame = av.AudioFrame.from_ndarray(wave[None], format="flt", layout="mono")
    frame.sample_rate = rate
    container.mux(stream.encode(frame))
    container.mux(stream.encode(None))

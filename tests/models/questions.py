"""Chats about pictures and sounds, as OpenAI clients send them, and how many patches each should make."""

from __future__ import annotations

import base64
import io
import random
import wave
from typing import Any, NamedTuple

from tests.pipeline.chats import png, scribble

SAMPLE_RATE = 16_000
_MODALITIES = {"image_url": "image", "video_url": "video", "input_audio": "audio"}


class Question(NamedTuple):
    """Messages, and the patches that their items are encoded as."""

    name: str
    messages: list[dict[str, Any]]
    num_patches: int

    @property
    def modalities(self) -> set[str]:
        """The modalities asked about."""
        kinds = {part["type"] for message in self.messages for part in message["content"]}
        return {_MODALITIES[kind] for kind in kinds if kind in _MODALITIES}


def ask(name: str, num_patches: int, *parts: dict[str, Any]) -> Question:
    """A question about what is in `parts`."""
    last = {"type": "text", "text": "What is in the picture?"}
    return Question(name, [{"role": "user", "content": [*parts, last]}], num_patches)


def text(num_times: int) -> dict[str, Any]:
    """The same words so many times; six tokens each time."""
    return {"type": "text", "text": "What is in the picture? " * num_times}


def picture(seed: int, width: int, height: int) -> dict[str, Any]:
    """A picture that is like no other."""
    return {"type": "image_url", "image_url": {"url": png(scribble(5000 + seed, (width, height)))}}


def film(seed: int, num_frames: int, size: tuple[int, int] = (96, 64)) -> dict[str, Any]:
    """A video of frames that are like no others, as the data URL of JPEG frames that vLLM takes."""
    frames = []
    for i in range(num_frames):
        file = io.BytesIO()
        scribble(6000 + 100 * seed + i, size).save(file, "JPEG", quality=95)
        frames.append(base64.b64encode(file.getvalue()).decode())
    return {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64," + ",".join(frames)}}


def sound(seed: int, seconds: float) -> dict[str, Any]:
    """Noise whose loudness changes, as a WAV file."""
    noise, samples = random.Random(seed), bytearray()
    while len(samples) < 2 * int(seconds * SAMPLE_RATE):
        loudness = 2 ** noise.randrange(4, 15)
        for value in noise.choices(range(-loudness, loudness), k=4000):
            samples += value.to_bytes(2, "little", signed=True)
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, SAMPLE_RATE, 0, "NONE", ""))
        out.writeframes(samples[: 2 * int(seconds * SAMPLE_RATE)])
    data = base64.b64encode(file.getvalue()).decode()
    return {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}


TEXT_ONLY = ask("text only", 0)


def pictures(one: int, two: tuple[int, int]) -> list[Question]:
    """Questions about pictures of three sizes: `one` patch count for 128x100, `two` for 64x64 and 200x100."""
    return [
        ask("one picture", one, picture(0, 128, 100)),
        ask("two pictures", sum(two), picture(1, 64, 64), picture(2, 200, 100)),
        TEXT_ONLY,
    ]

"""Videos, sounds and pictures in real files, by HTTP: tokens and log-probabilities equal to plain vLLM's."""

from __future__ import annotations

import base64
import concurrent.futures
import importlib.util
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.servers import DTYPE, Running
from epd.config import Config, EndpointConfig
from tests import media_files as files
from tests.media_files import audio_part, image_part, input_audio, text_part, video_part
from tests.models.conftest import Plain
from tests.models.registry import FAMILIES

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

Messages = list[dict[str, Any]]
MAX_TOKENS = 8
NUM_FRAMES = 64
ENGINE = {
    "max_model_len": 6144,
    "dtype": DTYPE,
    "media_io_kwargs": {"video": {"num_frames": NUM_FRAMES}},
}
# Stands for the folder with the local files.
FOLDER = "FOLDER"
LOCAL = {
    "film.mp4": lambda: files.video(seed=50),
    "picture.webp": lambda: files.picture("webp", seed=51),
    "sound.flac": lambda: files.audio("flac", seed=52),
}
WHAT = text_part("What is in the picture?")


def user(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": [*parts, WHAT]}


def said() -> dict[str, Any]:
    return {"role": "assistant", "content": [text_part("0 1 2")]}


def picture(seed: int, kind: str = "png", **options: Any) -> dict[str, Any]:
    return image_part(files.picture(kind, seed, **options), kind)


def film(seed: int, kind: str = "mp4", **options: Any) -> dict[str, Any]:
    return video_part(files.video(kind, seed=seed, **options), kind)


def clip(seed: int, seconds: float = 0.5) -> dict[str, Any]:
    return input_audio(files.audio("wav", seconds, seed))


def sound(seed: int, kind: str = "wav", seconds: float = 1.3, **options: Any) -> dict[str, Any]:
    return audio_part(files.audio(kind, seconds, seed, **options), kind)


def one(part: Callable[..., dict[str, Any]], *args: Any, **options: Any) -> Callable[[], Messages]:
    """A chat about one item."""
    return lambda: [user(part(*args, **options))]


# Name of a chat -> its messages, and how many items of it nobody has encoded before (None: some, each in pieces).
LOOKING: dict[str, tuple[Callable[[], Messages], int | None]] = {
    **{f"{kind} picture": (one(picture, i, kind), 1) for i, kind in enumerate(("png", "jpeg", "webp", "gif"))},
    **{f"{kind} film": (one(film, 10 + i, kind), 1) for i, kind in enumerate(files.VIDEO_CODECS)},
    "an animated gif as a picture": (one(picture, 20, "gif", count=3), 1),
    "an animated webp as a picture": (one(picture, 21, "webp", count=3), 1),
    "an animated gif as a film": (lambda: [user(video_part(files.picture("gif", 22, count=3), "gif"))], 1),
    "a film as JPEG frames": (lambda: [user(video_part(files.jpeg_frames(5, seed=23)))], 1),
    "a film from a file": (lambda: [user(video_part(f"file://{FOLDER}/film.mp4"))], 1),
    "a picture from a file": (lambda: [user(image_part(f"file://{FOLDER}/picture.webp"))], 1),
    "64 frames of a longer film": (one(film, 24, count=90, fps=30), 1),
    "32 pictures": (lambda: [user(*(picture(200 + i, size=(64, 64)) for i in range(32)))], 32),
    "pictures, films and text mixed": (
        lambda: [user(text_part("User:"), picture(30), text_part("0"), film(31), WHAT, picture(32), film(33))],
        4,
    ),
    "the same items again and again": (lambda: [user(*[picture(34), film(35)] * 2, picture(34))], 2),
    "a first turn": (lambda: [user(picture(36), film(37))], 2),
    "a second turn": (lambda: [user(picture(36), film(37)), said(), user(picture(38))], 1),
    "text only": (lambda: [user()], 0),
}
ONE_SOUND: dict[str, tuple[Callable[[], Messages], int | None]] = {
    **{f"{kind} by URL": (one(sound, i, kind), 1) for i, kind in enumerate([*files.AUDIO_SUBTYPES, "m4a", "webm"])},
    **{
        f"{kind} as input_audio": (lambda kind=kind, i=i: [user(input_audio(files.audio(kind, 1.1, 20 + i), kind))], 1)
        for i, kind in enumerate(("wav", "mp3", "flac"))
    },
    "another rate and two channels": (one(sound, 30, rate=44_100, channels=2), 1),
    "an mp3 that is called wav": (lambda: [user(audio_part(files.audio("mp3", 1, 31), "wav"))], 1),
    "the sound of a film": (lambda: [user(audio_part(files.sound_and_film(), "mp4"))], 1),
    "a sound from a file": (lambda: [user(audio_part(f"file://{FOLDER}/sound.flac"))], 1),
    "40 seconds": (one(sound, 31, "mp3", 40), None),
    "text only": (lambda: [user()], 0),
}
LISTENING = ONE_SOUND | {
    "24 clips": (lambda: [user(*(clip(200 + i, 0.3 + i / 50) for i in range(24)))], 24),
    "clips and text mixed": (lambda: [user(text_part("User:"), clip(32), WHAT, clip(33), text_part("0"))], 2),
    "the same clips again and again": (lambda: [user(*[clip(34), clip(35)] * 2, clip(34))], 2),
    "a first turn": (lambda: [user(clip(36))], 1),
    "a second turn": (lambda: [user(clip(36)), said(), user(clip(37))], 1),
}
MODELS = {"llava_onevision": LOOKING, "qwen2_audio": LISTENING, "audioflamingo3": ONE_SOUND}
# vLLM has Audio Flamingo 3 answer about one sound in a request.
AUDIOS = {"audioflamingo3": 1}


def _for_plain(messages: Messages) -> Messages:
    """The same chat with sounds of other rates resampled: vLLM itself can do that only with torchaudio."""
    if importlib.util.find_spec("torchaudio") is not None:
        return messages
    return [
        message
        | {"content": [_resampled(part) if part["type"] == "audio_url" else part for part in message["content"]]}
        for message in messages
    ]


def _resampled(part: dict[str, Any]) -> dict[str, Any]:
    import soxr
    from vllm.multimodal.media.audio import load_audio

    header, _, data = part["audio_url"]["url"].partition(",")
    if not header.startswith("data:"):
        return part
    samples, rate = load_audio(io.BytesIO(base64.b64decode(data)), sr=None)
    if rate == files.RATE:
        return part
    return audio_part(files.sound_file(soxr.resample(samples, rate, files.RATE), "WAV", "FLOAT"))


class Both:
    """A pipeline, and what plain vLLM says to each of its chats."""

    def __init__(self, folder: Path, name: str, plain_vllm: Plain) -> None:
        for file, content in LOCAL.items():
            (folder / file).write_bytes(content())
        self.chats: dict[str, Messages] = {
            chat: json.loads(json.dumps(messages()).replace(FOLDER, str(folder)))
            for chat, (messages, _) in MODELS[name].items()
        }
        model = FAMILIES[name].folder(folder, name)
        served = ENGINE | {"limit_mm_per_prompt": {"image": 32, "video": 4, "audio": AUDIOS.get(name, 24)}}
        engine = served | {"kv_cache_memory_bytes": 64 << 20, "allowed_local_media_path": str(folder)}
        chats = [_for_plain(messages) for messages in self.chats.values()]
        task = {"model": str(model), "engine": engine, "max_tokens": MAX_TOKENS, "chats": chats}
        endpoint = EndpointConfig(port=0, allowed_local_media_path=str(folder))
        config = Config(model=str(model), served_model_name="tiny", engine=served, endpoint=endpoint)
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answering = pool.submit(plain_vllm, task)
            self.running = Running(config, encode=2, prefill=1, decode=1)
            self.plain: dict[str, Any] = dict(zip(self.chats, answering.result(), strict=True))

    def ask(self, chat: str) -> tuple[dict[str, Any], int]:
        """The pipeline's answer, and how many patches were encoded for it."""
        body = {"model": "tiny", "messages": self.chats[chat], "temperature": 0, "max_tokens": MAX_TOKENS}
        body |= {"ignore_eos": True, "return_token_ids": True, "logprobs": True}
        reply = self.running.http.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, reply.text
        [request] = self.running.http.get(f"/v1/requests/{reply.json()['id']}").json()["requests"]
        return reply.json(), sum(event["event"] == "encoded" for event in request["events"])


@pytest.fixture(scope="module")
def servers(plain_vllm: Plain, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Both]]:
    """The pipeline of a model; the one before it is closed."""
    running: dict[str, Both] = {}

    def serve(name: str) -> Both:
        if name not in running:
            while running:
                running.popitem()[1].running.close()
            running[name] = Both(tmp_path_factory.mktemp(name), name, plain_vllm)
        return running[name]

    yield serve
    while running:
        both = running.popitem()[1]
        try:
            both.running.wait_idle()
        finally:
            both.running.close()


@pytest.mark.parametrize(("model", "chat"), [(model, chat) for model, chats in MODELS.items() for chat in chats])
def test_tokens_and_log_probabilities_are_equal_and_nothing_is_encoded_twice(
    servers: Callable[[str], Both], model: str, chat: str
) -> None:
    both = servers(model)
    plain = both.plain[chat]
    for expected in (MODELS[model][chat][1], 0):
        answer, num_encoded = both.ask(chat)
        [choice] = answer["choices"]
        assert choice["token_ids"] == plain["token_ids"]
        assert answer["usage"]["prompt_tokens"] == plain["num_prompt_tokens"]
        found = [line["logprob"] for line in choice["logprobs"]["content"]]
        assert found == pytest.approx(plain["logprobs"], abs=0.03)
        assert num_encoded == expected if expected is not None else num_encoded > 0

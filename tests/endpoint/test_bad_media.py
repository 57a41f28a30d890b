"""Bad videos and sounds are a 400 with a reason; nothing of them reaches the broker, and the endpoint lives on."""

import asyncio
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import pytest_asyncio

from tests import media_files as files
from tests.media_files import audio_part, input_audio, text_part, video_part

from .fake_broker import says
from .serving import chat_body, serving

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(120)]

LIMITS = {"max_videos": 2, "max_audios": 2, "max_video_frames": 64, "max_video_s": 20.0, "max_audio_s": 20.0}
ENGINE = {"max_model_len": 4096, "enforce_eager": True, "dtype": "bfloat16"}


SEES, HEARS = (pytest.mark.parametrize("served", [name], indirect=True) for name in ("llava_onevision", "qwen2_audio"))


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["llava_onevision", "qwen2_audio"])
async def served(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    model = folder / "model"
    make = [sys.executable, "-m", "tests.models.tiny", request.param, str(model)]
    await asyncio.to_thread(subprocess.run, make, check=True, env=os.environ)
    options = {"model": str(model), "engine": ENGINE, "allowed_local_media_path": str(folder), **LIMITS}
    options["serve"] = {"trust_request_mm_kwargs": True}
    async with serving(folder, **options) as served:
        served.broker.script = says([100])
        served.is_video, served.folder = request.param == "llava_onevision", folder
        yield served


async def ask(served, *parts, **fields):
    answer, text = await served.post("/v1/chat/completions", chat_body([*parts, text_part("?")], **fields))
    return answer.status, json.loads(text)


async def refused(served, *parts, words="", **fields):
    served.broker.submits.clear()
    status, body = await ask(served, *parts, **fields)
    assert status == 400, body
    assert not served.broker.submits
    assert words in body["error"]["message"], body
    return body["error"]["type"]


def nan():
    wave = files.samples(1)
    wave[100] = np.nan
    return files.sound_file(wave, "WAV", "FLOAT")


def middle_gone(content):
    """The file with its second quarter overwritten."""
    quarter = len(content) // 4
    return content[:quarter] + b"\xa5" * quarter + content[2 * quarter :]


BAD_FILMS = {
    "truncated": (files.video()[:-200], "truncated"),
    "truncated webm": (files.video("webm")[:-200], "truncated"),
    "no frames": (files.video("webm", count=0), ""),
    "a sound": (files.audio("m4a"), "no video"),
    "a wav": (files.audio("wav"), "not MP4"),
    "a picture": (files.picture("png"), "not MP4"),
    "a playlist": (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "not MP4"),
    "random bytes": (b"\x17\x92" * 500, "not MP4"),
}


@SEES
async def test_bad_films_are_refused(served):
    for name, (content, words) in BAD_FILMS.items():
        assert await refused(served, video_part(content), words=words) == "invalid_video", name
    long = files.video(count=21, fps=1)
    assert await refused(served, video_part(long), words="21.0 s") == "video_too_long"
    assert await refused(served, video_part(files.jpeg_frames(65))) == "too_many_frames"
    assert await refused(served, video_part("data:video/jpeg;base64,AAAA,BBBB")) == "invalid_image"
    for url in ("data:video/mp4;base64,%%%", "data:video/mp4;base64,", "data:video/jpeg;base64,"):
        await refused(served, video_part(url))
    for url in ("http://169.254.169.254/film.mp4", "https://a.example/a.mp4", "file:///etc/passwd"):
        assert await refused(served, video_part(url)) == "url_not_allowed"
    film = video_part(files.video())
    assert await refused(served, film, film, film, words="2 videos") == "too_many_videos"
    assert await refused(served, input_audio(files.audio())), "a model that hears nothing"


@SEES
async def test_frames_are_bounded_where_they_are_sampled(served):
    film = video_part(files.video(count=90, fps=30))
    assert await refused(served, film, media_io_kwargs={"video": {"num_frames": 65}}) == "too_many_frames"
    status, body = await ask(served, film, media_io_kwargs={"video": {"num_frames": 64}})
    assert status == 200, body
    (served.folder / "broken.mp4").write_bytes(files.video()[:1000])
    assert await refused(served, video_part(f"file://{served.folder}/broken.mp4"), words="truncated") == "invalid_video"


@SEES
async def test_a_film_that_turns_out_damaged_is_answered_or_refused(served):
    for kind in files.VIDEO_CODECS:
        status, body = await ask(served, video_part(middle_gone(files.video(kind, count=30)), kind))
        assert status in (200, 400), body


@HEARS
async def test_bad_sounds_are_refused(served):
    bad = {
        "zero": (files.sound_file(np.zeros(0, np.float32), "WAV", "PCM_16"), "zero"),
        "claims hours": (files.wav_header(5 * 3600), "truncated"),
        "no rate": (files.wav_header(1, rate=0), ""),
        "absurd rate": (files.wav_header(0.00001, rate=2_000_000_000), ""),
        "channels": (files.audio("wav", channels=20), "channels"),
        "no numbers": (nan(), "finite"),
        "a film without sound": (files.video(), "no audio"),
        "a picture": (files.picture("png"), "not WAV"),
        "random bytes": (b"\x17\x92" * 500, "not WAV"),
        "a playlist": (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "not WAV"),
        "a FLAC in half": (files.audio("flac")[:4000], "decode"),
    }
    for name, (content, words) in bad.items():
        assert await refused(served, input_audio(content), words=words) == "invalid_audio", name
        assert await refused(served, audio_part(content), words=words) == "invalid_audio", name
    assert await refused(served, input_audio(files.audio("flac", 21))) == "audio_too_long"
    for url in ("data:audio/wav;base64,%%%", "data:audio/wav;base64,"):
        assert await refused(served, audio_part(url)) == "invalid_audio"
    for url in ("http://169.254.169.254/a.wav", "https://a.example/a.wav", "file:///etc/passwd"):
        assert await refused(served, audio_part(url)) == "url_not_allowed"
    clip = input_audio(files.audio("wav", 0.2))
    assert await refused(served, clip, clip, clip, words="2 audios") == "too_many_audios"
    assert await refused(served, video_part(files.video())), "a model that sees nothing"


@HEARS
async def test_a_sound_of_one_sample_is_answered_or_refused(served):
    for length in (1, 8, 200, 500):
        status, body = await ask(served, input_audio(files.sound_file(files.samples(1)[:length], "WAV", "PCM_16")))
        assert status in (200, 400), (length, body)


async def test_media_without_data_are_refused(served):
    for part in (
        {"type": "video_url", "video_url": None, "uuid": "x"},
        {"type": "audio_url", "audio_url": {"url": ""}, "uuid": "x"},
        {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}, "uuid": "x"},
    ):
        await refused(served, part)


async def test_a_clip_cannot_be_uploaded_ahead_and_the_answer_says_so(served):
    for content in (files.video(), files.audio("wav")):
        async with served.session.post("/v1/media", data=content) as answer:
            error = (await answer.json())["error"]
            assert answer.status == 400 and "only pictures" in error["message"]


async def test_what_is_good_is_answered_and_named_by_its_content(served):
    make = files.video if served.is_video else files.audio
    part = video_part if served.is_video else audio_part
    named, sent = [], []
    for seed in (70, 70, 71):
        status, body = await ask(served, part(make(seed=seed)))
        assert status == 200, body
        patches = served.broker.submits[-1].patches
        named.append([patch.patch_hash for patch in patches])
        sent.append(all(patch.num_frames for patch in patches))
    assert named[0] == named[1] != named[2]
    assert sent == [True, False, True], "what the cache has is not sent again"

"""Videos and sounds as the client takes them."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from fake_endpoint import FakeEndpoint

from epd.client import Client, PictureError
from epd.client.clips import clip_part
from tests import media_files as files

WAV, MP4 = files.audio("wav", 0.1), files.video(count=2)


@pytest.mark.parametrize(
    ("modality", "content", "media_type"),
    [
        ("video", MP4, "video/mp4"),
        ("video", files.video("webm", count=2), "video/webm"),
        ("video", files.picture("gif", count=2), "video/gif"),
        ("audio", WAV, "audio/wav"),
        ("audio", files.audio("mp3", 0.2), "audio/mpeg"),
        ("audio", files.audio("flac", 0.1), "audio/flac"),
        ("audio", MP4, "audio/mp4"),
    ],
)
def test_files_and_bytes_are_sent_unchanged_with_their_type(
    modality: str, content: bytes, media_type: str, tmp_path: Path
) -> None:
    path = tmp_path / "clip.with-any-name"
    path.write_bytes(content)
    for clip in (content, bytearray(content), memoryview(content), path, str(path)):
        part = clip_part(modality, clip)
        assert part["type"] == f"{modality}_url"
        head, _, data = part[f"{modality}_url"]["url"].partition(",")
        assert head == f"data:{media_type};base64"
        assert base64.b64decode(data, validate=True) == content


@pytest.mark.parametrize("url", ["https://a/b.mp4", "data:audio/wav;base64,AAAA", "file:///x/y.wav"])
def test_urls_are_handed_on(url: str) -> None:
    assert clip_part("audio", url)["audio_url"]["url"] == url


def test_what_is_no_clip_is_named(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="no video file"):
        clip_part("video", tmp_path / "missing.mp4")
    for wrong in (WAV, b"hello", files.picture("png")):
        with pytest.raises(PictureError, match="these bytes is not MP4"):
            clip_part("video", wrong)
    with pytest.raises(PictureError, match="empty"):
        clip_part("audio", b"")
    with pytest.raises(PictureError, match="not float"):
        clip_part("audio", 1.0)  # type: ignore[arg-type]


def test_clips_of_a_call_come_before_the_text(endpoint: FakeEndpoint) -> None:
    with Client(endpoint.url, model="m") as client:
        client.generate("What?", images=[files.picture("png")], videos=[MP4], audios=[WAV, WAV])
    [body] = endpoint.bodies
    kinds = [part["type"] for part in body["messages"][0]["content"]]
    assert kinds == ["image_url", "video_url", "audio_url", "audio_url", "text"]
    assert "videos" not in body and "audios" not in body


def test_clips_may_stand_in_messages(endpoint: FakeEndpoint) -> None:
    content = [
        {"type": "audio", "audio": WAV, "uuid": "x"},
        {"type": "video", "video": MP4},
        {"type": "text", "text": "?"},
    ]
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": content}]
    with Client(endpoint.url, model="m") as client:
        client.generate(messages=messages)
        sound, film, text = endpoint.bodies[0]["messages"][1]["content"]
        assert sound["uuid"] == "x" and sound["audio_url"]["url"].startswith("data:audio/wav;base64,")
        assert film["video_url"]["url"].startswith("data:video/mp4;base64,") and text == content[2]
        assert content[0]["type"] == "audio", "the argument is left as it is"
        with pytest.raises(PictureError, match='under the key "video"'):
            client.generate(messages=[{"role": "user", "content": [{"type": "video"}]}])
        with pytest.raises(ValueError, match="content parts"):
            client.generate(messages=messages, audios=[WAV])


def test_one_clip_where_several_are_meant_is_a_type_error(endpoint: FakeEndpoint) -> None:
    with Client(endpoint.url, model="m") as client, pytest.raises(TypeError, match=r"videos=\[clip\]"):
        client.generate("What?", videos="film.mp4")

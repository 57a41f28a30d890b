"""Videos and sounds as the client takes them."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_endpoint import FakeEndpoint

from epd.client import Client, PictureError
from epd.client.clips import clip_or_url
from tests import media_files as files

WAV, MP4 = files.audio("wav", 0.1), files.video(count=2)


def clip_url(modality: str, clip: Any) -> str:
    """What stands for a clip in a request."""
    place = clip_or_url(modality, clip)
    if isinstance(place, str):
        return place
    place.load()
    return place.url()


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
    for clip in (content, bytearray(content), memoryview(content), path, str(path), io.BytesIO(content)):
        head, _, data = clip_url(modality, clip).partition(",")
        assert head == f"data:{media_type};base64"
        assert base64.b64decode(data, validate=True) == content


@pytest.mark.parametrize("url", ["https://a/b.mp4", "data:audio/wav;base64,AAAA", "file:///x/y.wav"])
def test_urls_are_handed_on(url: str) -> None:
    assert clip_url("audio", url) == url


def test_the_error_names_what_is_not_a_clip(tmp_path: Path) -> None:
    with pytest.raises(PictureError, match="no video file"):
        clip_url("video", tmp_path / "missing.mp4")
    for wrong in (WAV, b"hello", files.picture("png")):
        with pytest.raises(PictureError, match="these bytes is not MP4"):
            clip_url("video", wrong)
    with pytest.raises(PictureError, match="empty"):
        clip_url("audio", b"")
    with pytest.raises(PictureError, match="not float"):
        clip_url("audio", 1.0)


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


FORMS: dict[str, Callable[[Path], Any]] = {
    "list": lambda path: [path],
    "tuple": lambda path: (str(path),),
    "generator": lambda path: (each for each in [path]),
    "glob": lambda path: path.parent.glob(path.name),
    "map": lambda path: map(Path.read_bytes, [path]),
    "one path": lambda path: path,
    "one text": str,
    "one file's bytes": Path.read_bytes,
    "one open file": lambda path: io.BytesIO(path.read_bytes()),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(("modality", "content"), [("video", MP4), ("audio", WAV)])
def test_one_clip_and_any_iterable_of_clips_are_sent(
    endpoint: FakeEndpoint, tmp_path: Path, form: Callable[[Path], Any], modality: str, content: bytes
) -> None:
    path = tmp_path / "clip"
    path.write_bytes(content)
    with Client(endpoint.url, model="m") as client:
        arguments: Any = {f"{modality}s": form(path)}
        client.generate("What?", **arguments)
    [part, _] = endpoint.bodies[0]["messages"][0]["content"]
    assert part == {"type": f"{modality}_url", f"{modality}_url": {"url": clip_url(modality, content)}}


@pytest.mark.parametrize("wrong", [7, {"a": "b"}, object()])
def test_what_holds_no_clips_is_a_type_error_that_says_what_is_taken(endpoint: FakeEndpoint, wrong: Any) -> None:
    with Client(endpoint.url) as client:
        with pytest.raises(
            TypeError, match="videos takes a path, a URL, bytes or an open file, or an iterable of them"
        ):
            client.generate("What?", videos=wrong)
        with pytest.raises(PictureError, match="a clip must be a path"):
            client.generate("What?", audios=[wrong])
    assert endpoint.bodies == []

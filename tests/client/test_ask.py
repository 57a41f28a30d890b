from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from aiohttp import web
from fake_endpoint import DONE, FakeEndpoint, complete, error, event, hang, streamed
from PIL import Image

from epd.cli import ask
from tests import media_files as files


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser("epd")
    ask.add_parser(parser.add_subparsers())
    args = parser.parse_args(["ask", *arguments])
    code = args.run(args)
    assert isinstance(code, int)
    return code


def test_the_answer_is_streamed_to_stdout_with_a_newline_at_the_end(
    endpoint: FakeEndpoint, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    endpoint.answer = streamed(event("4"), event("2", finish="stop"), DONE)
    path = tmp_path / "a.png"
    Image.new("RGB", (2, 2)).save(path)
    code = run("--url", endpoint.url, "--image", str(path), "--image", "https://a/b", "--max-tokens", "5", "what?")
    assert code == 0
    assert capsys.readouterr() == ("42\n", "")
    [body] = endpoint.bodies
    assert body["model"] == "tiny", "the first model that the endpoint offers"
    assert (body["stream"], body["max_tokens"]) == (True, 5)
    assert [part["type"] for part in body["messages"][0]["content"]] == ["image_url", "image_url", "text"]


def test_videos_and_sounds_are_sent_along(endpoint: FakeEndpoint, tmp_path: Path) -> None:
    for name, content in (("a.mp4", files.video(count=2)), ("a.mp3", files.audio("mp3", 0.2))):
        (tmp_path / name).write_bytes(content)
    clips = ("--video", str(tmp_path / "a.mp4"), "--audio", str(tmp_path / "a.mp3"), "--audio", "https://a/b.wav")
    assert run("--url", endpoint.url, "--no-stream", *clips, "what?") == 0
    kinds = [part["type"] for part in endpoint.bodies[0]["messages"][0]["content"]]
    assert kinds == ["video_url", "audio_url", "audio_url", "text"]
    assert run("--url", endpoint.url, "--video", str(tmp_path / "a.mp3"), "what?") == 2
    assert len(endpoint.bodies) == 1


def test_no_stream_prints_the_whole_answer(endpoint: FakeEndpoint, capsys: pytest.CaptureFixture[str]) -> None:
    endpoint.answer = complete("42")
    assert run("--url", endpoint.url, "--no-stream", "--model", "m", "--temperature", "0", "what?") == 0
    assert capsys.readouterr() == ("42\n", "")
    assert endpoint.bodies[0]["stream"] is False
    assert (endpoint.bodies[0]["model"], endpoint.bodies[0]["temperature"]) == ("m", 0)


def test_the_api_key_comes_from_the_environment(endpoint: FakeEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EPD_API_KEY", "k")
    assert run("--url", endpoint.url, "--no-stream", "what?") == 0
    assert endpoint.headers[0]["Authorization"] == "Bearer k"


def test_a_missing_picture_is_a_usage_error(endpoint: FakeEndpoint, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--url", endpoint.url, "--image", "missing.png", "what?") == 2
    assert capsys.readouterr() == ("", "epd ask: there is no picture file 'missing.png'\n")
    assert endpoint.bodies == []


def test_a_bad_url_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--url", "localhost:8400", "what?") == 2
    assert "http://host:port" in capsys.readouterr().err


def test_no_endpoint_gives_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert run("--url", url, "what?") == 1
    expected = f"epd ask: cannot connect to {url}: Connection refused; is `epd up` running?\n"
    assert capsys.readouterr() == ("", expected)


@pytest.mark.parametrize(
    ("status", "hint"),
    [
        (400, "too long (status 400)\n"),
        (401, "EPD_API_KEY"),
        (404, "one of its models?"),
        (503, "try again in 7 s"),
        (429, "try again in 7 s"),
        (500, "too long (status 500)\n"),
    ],
)
def test_an_error_of_the_endpoint_is_one_line(
    endpoint: FakeEndpoint, capsys: pytest.CaptureFixture[str], status: int, hint: str
) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        return error(status, "too long", Retry_After="7")

    endpoint.answer = answer
    assert run("--url", endpoint.url, "what?") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("epd ask: too long")
    assert err.count("\n") == 1
    assert hint in err


def test_an_answer_that_breaks_off_ends_its_line(endpoint: FakeEndpoint, capsys: pytest.CaptureFixture[str]) -> None:
    endpoint.answer = streamed(event("4"))
    assert run("--url", endpoint.url, "what?") == 1
    assert capsys.readouterr() == ("4\n", "epd ask: the stream ended before the answer did\n")


ASK = """
import argparse, sys
from epd.cli import ask
from tests import media_files as files
parser = argparse.ArgumentParser()
ask.add_parser(parser.add_subparsers())
sys.exit(ask.run(parser.parse_args(sys.argv[1:])))
"""


def start(endpoint: FakeEndpoint) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", ASK, "ask", "--url", endpoint.url, "what?"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_ctrl_c_hangs_up_and_exits_130(endpoint: FakeEndpoint) -> None:
    endpoint.answer = streamed(event("4"), then=hang)
    with start(endpoint) as process:
        assert process.stdout is not None
        assert os.read(process.stdout.fileno(), 10) == b"4", "each chunk is flushed"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, b"\n", b"")
    assert endpoint.cancelled.wait(5)


def test_a_reader_that_leaves_ends_the_command_quietly(endpoint: FakeEndpoint) -> None:
    endpoint.answer = streamed(*[event("4")] * 50, event(finish="stop"), DONE)
    with start(endpoint) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.wait(20) == 1
        assert process.stderr.read() == b""

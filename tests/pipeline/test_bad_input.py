"""Bad requests to the real pipeline: refused with a reason, and nobody else notices."""

from __future__ import annotations

import base64
import concurrent.futures
import struct
import time
import zlib

import httpx
import pytest

from benchmarks.servers import MAX_IMAGES, Running
from epd.builtin import DEMO_ANSWER, DEMO_QUESTION, MODEL_NAME
from epd.config import BrokerConfig
from tests import media_files as files
from tests.pipeline.chats import ask, chat, demo, scribble, tokens

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]


def png_header(width: int, height: int) -> bytes:
    """The start of a PNG of that size, with hardly any pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def with_url(url: str) -> dict:
    body = chat(DEMO_QUESTION)
    body["messages"][0]["content"].insert(0, {"type": "image_url", "image_url": {"url": url}})
    return body


def with_part(part: dict) -> dict:
    body = chat(DEMO_QUESTION)
    body["messages"][0]["content"].insert(0, part)
    return body


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


GOOD = base64.b64decode(chat("", [demo()])["messages"][0]["content"][0]["image_url"]["url"].split(",")[1])

BAD = {
    "a video for a model that takes none": (with_part(files.video_part(files.video())), 400),
    "a sound for a model that takes none": (with_part(files.input_audio(files.audio())), 400),
    "a truncated video": (with_part(files.video_part(files.video()[:2000])), 400),
    "a sound of no length": (with_part(files.audio_part(files.wav_header(0, body=b""))), 400),
    "not an image": (with_url(data_url(b"This is no picture.")), 400),
    "a truncated image": (with_url(data_url(GOOD[: len(GOOD) // 2])), 400),
    "a header of 50,000 x 50,000 pixels": (with_url(data_url(png_header(50_000, 50_000))), 400),
    "0 x 0 pixels": (with_url(data_url(png_header(0, 0))), 400),
    "broken base64": (with_url("data:image/png;base64,!!!!"), 400),
    "a remote URL": (with_url("http://127.0.0.1:1/picture.png"), 400),
    "a file": (with_url("file:///etc/hostname"), 400),
    "too many images": (chat("?", [scribble(1, (16, 16))] * (MAX_IMAGES + 1)), 400),
    "a prompt that is too long": (chat("digits " * 3000), 400),
    "an unknown model": (chat("?", model="gpt-17"), 404),
    "a field of the wrong type": (chat("?", max_tokens="many"), 400),
    "an unknown part": ({**chat("?"), "messages": [{"role": "user", "content": [{"type": "smell"}]}]}, 400),
    "no messages": ({"model": MODEL_NAME}, 400),
    "n of 0": (chat("?", n=0), 400),
    "a negative max_tokens": (chat("?", max_tokens=-3), 400),
}


@pytest.fixture(scope="module")
def all_counted(epd: httpx.Client) -> None:
    """The endpoint's own first requests are counted: counters come with heartbeats, a moment after what they count."""
    until, before = time.monotonic() + 30, -1.0
    while (now := accepted(epd)) != before or not now:
        assert time.monotonic() < until, "the counters do not come to rest"
        before = now
        time.sleep(1.5 * BrokerConfig().heartbeat_s)


@pytest.mark.usefixtures("all_counted")
@pytest.mark.parametrize(("body", "status"), BAD.values(), ids=BAD)
def test_a_bad_request_is_refused_with_a_reason_before_any_engine_sees_it(
    epd: httpx.Client, running: Running, body: dict, status: int
) -> None:
    before = accepted(epd)
    reply = epd.post("/v1/chat/completions", json=body)
    assert reply.status_code == status, reply.text
    assert len(reply.json()["error"]["message"]) > 10
    running.wait_idle()
    assert accepted(epd) == before, "the broker never heard of it"


def accepted(epd: httpx.Client) -> float:
    [line] = [line for line in epd.get("/metrics").text.splitlines() if line.startswith("epd_broker_accepted_total ")]
    return float(line.split()[1])


def test_malformed_json_and_bodies_over_the_limit_are_refused(epd: httpx.Client) -> None:
    headers = {"content-type": "application/json"}
    assert epd.post("/v1/chat/completions", content=b"{nope", headers=headers).status_code == 400
    large = b" " * (65 << 20)
    assert epd.post("/v1/chat/completions", content=large, headers=headers).status_code == 413


def test_good_requests_are_answered_while_bad_ones_rain(running: Running) -> None:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        bad = [pool.submit(running.http.post, "/v1/chat/completions", json=body) for body, _ in BAD.values()]
        good = [pool.submit(ask, running.http, chat(DEMO_QUESTION, [demo()])) for _ in range(6)]
        assert all(400 <= one.result().status_code < 500 for one in bad)
        assert all(tokens(one.result())[0][1].strip() == DEMO_ANSWER for one in good)
    running.wait_idle()

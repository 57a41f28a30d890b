"""Families with M-RoPE: tokens and log-probabilities equal to plain vLLM's, with images and videos."""

from __future__ import annotations

import base64
import concurrent.futures
import io
from collections.abc import Sequence

import pytest

from benchmarks.servers import DTYPE, Running
from epd.config import Config, EndpointConfig
from tests import media_files as files
from tests.media_files import video_part
from tests.models.conftest import Plain
from tests.models.registry import FAMILIES
from tests.pipeline.chats import png, scribble
from tests.pipeline.test_disaggregation import of, story

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

# vLLM takes 32 frames of a video if it is not told otherwise.
ENGINE = {"max_model_len": 4096, "dtype": DTYPE, "media_io_kwargs": {"video": {"num_frames": 64}}}
MAX_TOKENS = 12
# Of natural logarithms. The decode worker computes the prompt's last token alone.
TOLERANCE = 0.03
SMALL, WIDE = (112, 84), (168, 112)


def image(seed: int, size: tuple[int, int]) -> dict:
    return {"type": "image_url", "image_url": {"url": png(scribble(seed, size))}}


def video(seeds: Sequence[int], size: tuple[int, int] = SMALL) -> dict:
    """A video of one frame for each seed, as the data URL of JPEG frames that vLLM takes."""
    frames = []
    for seed in seeds:
        file = io.BytesIO()
        scribble(seed, size).save(file, "JPEG", quality=95)
        frames.append(base64.b64encode(file.getvalue()).decode())
    return {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64," + ",".join(frames)}}


def says(text: str) -> dict:
    return {"type": "text", "text": text}


def user(*parts: dict, text: str = "What is in the picture?") -> dict:
    return {"role": "user", "content": [*parts, says(text)]}


EIGHT = video(range(6000, 6008))
LARGE = (224, 224)  # 64 tokens: three of them are more than a block of the prefix cache
THREE = [image(seed, LARGE) for seed in (6200, 6201, 6202)]
CHATS: dict[str, list[dict]] = {
    "one image": [user(image(6100, WIDE))],
    "two images of different sizes": [user(image(6101, SMALL), says("and"), image(6102, WIDE))],
    "several turns": [
        user(image(6103, WIDE)),
        {"role": "assistant", "content": "0 1 2 3"},
        user(text="Is it?"),
        {"role": "assistant", "content": "3"},
        user(image(6104, SMALL)),
    ],
    "text only": [user()],
    "a video": [user(EIGHT)],
    "a video that stands still": [user(video([6010] * 6))],
    "an image and a video": [user(image(6105, WIDE), video(range(6020, 6024), WIDE), image(6106, SMALL))],
    "three images": [user(*THREE)],
    "three images again": [user(*THREE)],
    "three other images": [user(image(6203, LARGE), *THREE[1:])],
    "a long video": [user(video(range(6030, 6094)))],
    "a video in an mp4 file": [user(video_part(files.video("mp4", count=8, seed=60)))],
    "a video in a webm file": [user(video_part(files.video("webm", count=8, seed=61), "webm"), THREE[0])],
}
# Chat -> patches that must be encoded for it: images are whole, two frames make a temporal grid of a video.
NUM_PATCHES = {
    "one image": 1,
    "two images of different sizes": 2,
    "several turns": 2,
    "text only": 0,
    "a video": 4,
    "an image and a video": 4,
    "three images again": 0,
    "three other images": 1,
    "a long video": 32,
}


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "paddleocr_vl"])
def answers(request: pytest.FixtureRequest, plain_vllm: Plain, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What the pipeline and plain vLLM answer to each chat, the stories, and what the pipeline's workers hold."""
    family = FAMILIES[request.param]
    folder = str(family.folder(tmp_path_factory.mktemp("models"), request.param))
    chats = {name: chat for name, chat in CHATS.items() if "video" in family.units or "video" not in name}
    engine = ENGINE | {"limit_mm_per_prompt": family.limits}
    task = {
        "model": folder,
        "engine": engine | {"kv_cache_memory_bytes": 64 << 20},
        "max_tokens": MAX_TOKENS,
        "chats": [*chats.values()],
    }
    endpoint = EndpointConfig(port=0, max_images=4, serve={"trust_request_mm_kwargs": True})
    config = Config(model=folder, served_model_name="tiny", engine=engine, endpoint=endpoint)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        answering = pool.submit(plain_vllm, task)
        running = Running(config, encode=2, prefill=1, decode=1)
        try:
            return compare(running, chats, answering.result(), rates=request.param == "qwen2_5_vl")
        finally:
            running.close()


def compare(running: Running, chats: dict[str, list[dict]], plain: list[dict], rates: bool) -> dict:
    """See `answers`."""
    ours, stories = {}, {}
    for name, messages in chats.items():
        body = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS}
        body |= {"ignore_eos": True, "return_token_ids": True, "logprobs": True}
        reply = running.http.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200, reply.text
        ours[name] = reply.json()
        stories[name] = story(running.http, ours[name])
    found = {
        "plain": dict(zip(chats, plain, strict=True)),
        "ours": ours,
        "stories": stories,
        "rates": at_two_rates(running) if rates else None,
        "members": {one["name"]: one for one in running.http.get("/ready").json()["members"]},
    }
    running.wait_idle()
    return found


def at_two_rates(running: Running) -> list[list[float]]:
    """The first log-probabilities of the same frames shown fast, slowly, and slowly to a tenant without any cache."""
    found = []
    for fps, salt in ((2.0, ""), (0.5, ""), (0.5, "another")):
        body = {"model": "tiny", "messages": [user(video(range(6030, 6062)))], "temperature": 0, "max_tokens": 1}
        body |= {"logprobs": True, "top_logprobs": 5, "media_io_kwargs": {"video": {"fps": fps}}}
        reply = running.http.post("/v1/chat/completions", json=body | ({"cache_salt": salt} if salt else {}))
        assert reply.status_code == 200, reply.text
        [line] = reply.json()["choices"][0]["logprobs"]["content"]
        found.append([each["logprob"] for each in line["top_logprobs"]])
    return found


@pytest.mark.parametrize("name", CHATS)
def test_tokens_and_log_probabilities_are_equal(answers: dict, name: str) -> None:
    if name not in answers["ours"]:
        pytest.skip("a model without video")
    ours, plain = answers["ours"][name], answers["plain"][name]
    [choice] = ours["choices"]
    assert choice["token_ids"] == plain["token_ids"]
    assert ours["usage"]["prompt_tokens"] == plain["num_prompt_tokens"]
    found = [line["logprob"] for line in choice["logprobs"]["content"]]
    assert found == pytest.approx(plain["logprobs"], abs=TOLERANCE)


def test_each_temporal_grid_of_a_video_is_a_patch_and_each_image_one(answers: dict) -> None:
    counts = {name: len(of(events, "encoded")) for name, events in answers["stories"].items()}
    assert {name: counts[name] for name in NUM_PATCHES if name in counts} == {
        name: count for name, count in NUM_PATCHES.items() if name in counts
    }


def test_the_grids_of_a_video_are_encoded_by_both_encode_workers(answers: dict) -> None:
    if "a video" not in answers["stories"]:
        pytest.skip("a model without video")
    assert {event["worker"] for event in of(answers["stories"]["a video"], "encoded")} == {"encode-0", "encode-1"}


def test_equal_images_hit_the_prefix_cache_and_others_with_equal_tokens_do_not(answers: dict) -> None:
    cached = {}
    for name in ("three images", "three images again", "three other images"):
        [event] = of(answers["stories"][name], "prefilled")
        cached[name] = int(event["detail"].split()[0])
    assert answers["ours"]["three images"]["usage"] == answers["ours"]["three other images"]["usage"]
    assert cached["three images again"] >= 128 and cached["three other images"] == cached["three images"] == 0


def test_the_same_frames_at_another_rate_are_not_taken_for_each_other(answers: dict) -> None:
    if answers["rates"] is None:
        pytest.skip("a model whose positions do not follow the rate")
    fast, slow, fresh = answers["rates"]
    assert slow == pytest.approx(fresh, abs=TOLERANCE)
    assert slow != pytest.approx(fast, abs=10 * TOLERANCE), "positions in time"


def test_the_stages_hold_their_own_parameters_only(answers: dict) -> None:
    for name, member in answers["members"].items():
        mine, other = ("tower_bytes", "language_bytes")[:: 1 if name.startswith("encode") else -1]
        assert member[mine] > 100_000, name
        assert member[other] == 0, name

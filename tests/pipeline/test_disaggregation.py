"""The stages are really apart: who encodes, who holds which weights, who computes what."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.servers import DTYPE
from epd.builtin import DEMO_QUESTION, model_path
from epd.planning.configs import dtype_bytes
from tests.pipeline.chats import ask, chat, scribble, tokens

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]


def story(epd: httpx.Client, answer: dict) -> list[dict]:
    """The events of an answer's one request."""
    reply = epd.get(f"/v1/requests/{answer['id']}").json()
    [request] = reply["requests"]
    return request["events"]


def of(events: list[dict], name: str) -> list[dict]:
    return [event for event in events if event["event"] == name]


def test_the_patches_of_one_request_are_encoded_by_both_encode_workers(epd: httpx.Client) -> None:
    events = story(epd, ask(epd, chat(DEMO_QUESTION, [scribble(100)])))
    encoded = of(events, "encoded")
    assert {event["worker"] for event in encoded} == {"encode-0", "encode-1"}
    assert len({event["patch"] for event in encoded}) == len(encoded) == 9


def test_the_story_tells_every_stage_in_order(epd: httpx.Client) -> None:
    events = story(epd, ask(epd, chat(DEMO_QUESTION, [scribble(101)])))
    names = [event["event"] for event in events]
    for earlier, later in [
        ("accepted", "started"),
        ("started", "encode"),
        ("encode", "encoded"),
        ("prefilled", "finished"),
        ("first token", "finished"),
    ]:
        assert names.index(earlier) < names.index(later)
    assert names[-1] == "finished"
    assert "pushed" in names
    assert all(event["at_s"] >= 0 for event in events)


def test_a_picture_seen_before_is_not_encoded_again(epd: httpx.Client) -> None:
    body = chat(DEMO_QUESTION, [scribble(102)])
    first, second = ask(epd, body), ask(epd, body)
    assert tokens(first) == tokens(second)
    assert len(of(story(epd, first), "encoded")) == 9
    assert len(of(story(epd, second), "cache hit")) == 9
    assert of(story(epd, second), "encode") == []


def test_the_stages_hold_their_own_parameters_only(epd: httpx.Client) -> None:
    members = {one["name"]: one for one in epd.get("/ready").json()["members"]}
    assert set(members) == {"encode-0", "encode-1", "prefill-0", "decode-0"}
    for name, member in members.items():
        if member["stage"] == "encode":
            assert member["language_bytes"] == 0, name
            assert member["tower_bytes"] > 500_000, name
        else:
            assert member["tower_bytes"] == 0, name
            assert member["language_bytes"] > 1_000_000, name
    whole = num_parameters(model_path()) * dtype_bytes(DTYPE)
    held = members["encode-0"]["tower_bytes"] + members["decode-0"]["language_bytes"]
    assert held == pytest.approx(whole, rel=0.01), "together they are the whole model"


def num_parameters(model: Path) -> int:
    """Elements of all tensors in a model's one safetensors file."""
    data = (model / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def test_the_decode_worker_computes_nothing_of_the_prompt(epd: httpx.Client) -> None:
    answer = ask(epd, chat(DEMO_QUESTION, [scribble(103)], cache_salt="never seen before"))
    [decoding] = of(story(epd, answer), "decoding")
    num_tokens = answer["usage"]["prompt_tokens"]
    assert num_tokens > 60
    assert decoding["detail"] == f"KV of {num_tokens} of {num_tokens} tokens was pushed"


def test_prompt_tokens_are_counted_as_those_of_one_engine(epd: httpx.Client) -> None:
    def by_source() -> dict[str, float]:
        found = re.findall(
            r'vllm:prompt_tokens_by_source_total\{.*source="(\w+)"\} ([\d.e+]+)', epd.get("/metrics").text
        )
        return {source: float(value) for source, value in found}

    for number, more in enumerate(({}, {"presence_penalty": 0.1})):  # the latter's first token is sampled by decode
        before = by_source()
        salt = f"never seen before {number}"
        answer = ask(epd, chat(DEMO_QUESTION, [scribble(104)], cache_salt=salt, **more))
        after = by_source()
        moved = {source: after[source] - before.get(source, 0.0) for source in after}
        assert moved["local_compute"] == answer["usage"]["prompt_tokens"]
        assert moved["external_kv_transfer"] == moved["local_cache_hit"] == 0


def test_the_prefill_worker_gives_the_first_token_and_the_decode_worker_the_others(epd: httpx.Client) -> None:
    events = story(epd, ask(epd, chat(DEMO_QUESTION, [scribble(105)])))
    assert [one["worker"] for one in of(events, "first token")] == ["prefill-0"]
    assert [one["worker"] for one in of(events, "decoding")] == ["decode-0"]
    assert [one["worker"] for one in of(events, "finished")] == ["decode-0"]


def test_an_answer_of_one_token_is_the_prefill_worker_s_alone(epd: httpx.Client) -> None:
    answer = ask(epd, chat(DEMO_QUESTION, [scribble(106)], max_tokens=1))
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 1
    events = story(epd, answer)
    assert [one["detail"] for one in of(events, "started")] == ["prefill on prefill-0"]
    assert [one["worker"] for one in of(events, "finished")] == ["prefill-0"]
    assert not of(events, "decoding")


@pytest.mark.parametrize(
    "more", [{"presence_penalty": 0.5}, {"seed": 1, "temperature": 0.7}, {"response_format": {"type": "json_object"}}]
)
def test_what_depends_on_the_output_alone_is_sampled_by_the_decode_worker_from_the_start(
    epd: httpx.Client, more: dict[str, Any]
) -> None:
    events = story(epd, ask(epd, chat(DEMO_QUESTION, [scribble(107)], **more)))
    assert [one["worker"] for one in of(events, "first token")] == ["decode-0"]

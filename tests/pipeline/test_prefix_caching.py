"""KV that was computed before is used again where prompt and pictures are the same, nowhere else, on both stages."""

from __future__ import annotations

import concurrent.futures
import itertools
import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from PIL import Image

from benchmarks.servers import Running
from epd.config import Config
from tests.pipeline.chats import ask, chat, scribble, tokens
from tests.pipeline.conftest import config
from tests.pipeline.test_disaggregation import of, story

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]

BLOCK = 32
QUESTION = "How many digits are there?"
_numbers = itertools.count()


class Seen(msgspec.Struct):
    """An answer, and how much of its prompt each stage had, as its story says."""

    token_ids: list[int]
    logprobs: list[float]
    num_prompt_tokens: int
    usage: int
    prefill: int
    decode: int
    pushed: int


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Running]:
    """One worker of each stage, with blocks that are shorter than a picture's tokens."""
    settings: Config = config(warm_up=False, serve={"enable_prompt_tokens_details": True})
    settings.engine |= {"block_size": BLOCK}
    running = Running(settings, encode=1, prefill=1, decode=1)
    yield running
    running.wait_idle()
    running.close()


def look(running: Running, images: list[Image.Image], question: str = QUESTION, **more: Any) -> Seen:
    """Asks about pictures, one request at a time."""
    body = chat(question, images, logprobs=True, max_tokens=6, ignore_eos=True, **more)
    answer = ask(running.http, body)
    events = story(running.http, answer)
    [prefilled], [decoding] = of(events, "prefilled"), of(events, "decoding")
    pushed, of_tokens = map(int, re.findall(r"\d+", decoding["detail"]))
    return Seen(
        token_ids=tokens(answer)[0][0],
        logprobs=[line["logprob"] for line in answer["choices"][0]["logprobs"]["content"]],
        num_prompt_tokens=answer["usage"]["prompt_tokens"],
        usage=answer["usage"]["prompt_tokens_details"]["cached_tokens"],
        prefill=int(prefilled["detail"].split()[0]),
        decode=of_tokens - pushed,
        pushed=pushed,
    )


def fresh(running: Running, images: list[Image.Image], question: str = QUESTION) -> Seen:
    """The same computed anew, under a salt that was never used."""
    seen = look(running, images, question, cache_salt=f"never used before {next(_numbers)}")
    assert (seen.usage, seen.prefill, seen.decode) == (0, 0, 0)
    assert seen.pushed == seen.num_prompt_tokens
    return seen


def assert_equal(seen: Seen, expected: Seen) -> None:
    assert seen.token_ids == expected.token_ids
    assert seen.logprobs == pytest.approx(expected.logprobs, abs=0.03)


def test_equal_prompts_with_equal_pictures_hit_on_both_stages(pipeline: Running) -> None:
    images = [scribble(200), scribble(201)]
    expected, first, again = fresh(pipeline, images), look(pipeline, images), look(pipeline, images)
    whole_blocks = (first.num_prompt_tokens - 1) // BLOCK * BLOCK
    assert whole_blocks >= 3 * BLOCK
    assert (first.usage, first.prefill, first.decode) == (0, 0, 0)
    assert (again.usage, again.prefill, again.decode) == (whole_blocks, whole_blocks, whole_blocks)
    assert again.pushed == again.num_prompt_tokens - whole_blocks, "only what decode did not have is pushed"
    assert_equal(first, expected)
    assert_equal(again, expected)


def test_equal_tokens_with_another_picture_never_hit(pipeline: Running) -> None:
    one, other = [scribble(210), scribble(211)], [scribble(212), scribble(211)]
    expected = [fresh(pipeline, one), fresh(pipeline, other)]
    assert expected[0].num_prompt_tokens == expected[1].num_prompt_tokens
    assert expected[0].logprobs != pytest.approx(expected[1].logprobs, abs=0.06), "a wrong hit would show"
    seen = [look(pipeline, one), look(pipeline, other)]
    assert (seen[1].usage, seen[1].prefill, seen[1].decode) == (0, 0, 0)
    for found, wanted in zip(seen, expected, strict=True):
        assert_equal(found, wanted)


def test_the_same_pictures_in_another_order_never_hit(pipeline: Running) -> None:
    images = [scribble(220), scribble(221)]
    look(pipeline, images)
    seen = look(pipeline, images[::-1])
    assert (seen.usage, seen.prefill, seen.decode) == (0, 0, 0)
    assert_equal(seen, fresh(pipeline, images[::-1]))


def test_a_prompt_that_goes_on_differently_hits_up_to_the_first_other_picture(pipeline: Running) -> None:
    one, other = [scribble(230), scribble(231)], [scribble(230), scribble(232)]
    look(pipeline, one)
    seen = look(pipeline, other)
    shared = look(pipeline, one[:1], cache_salt="only to count").num_prompt_tokens
    assert seen.usage == seen.prefill == seen.decode
    assert BLOCK <= seen.prefill < shared, "whole blocks of the first picture"
    assert_equal(seen, fresh(pipeline, other))


def test_another_question_about_the_same_pictures_hits_up_to_the_question(pipeline: Running) -> None:
    images = [scribble(240), scribble(241)]
    look(pipeline, images)
    seen = look(pipeline, images, "List the digits.")
    assert seen.usage == seen.prefill == seen.decode == 3 * BLOCK
    assert_equal(seen, fresh(pipeline, images, "List the digits."))


def test_another_cache_salt_never_hits_and_the_same_one_does(pipeline: Running) -> None:
    images = [scribble(250), scribble(251)]
    expected = fresh(pipeline, images)
    seen = [look(pipeline, images, cache_salt=salt) for salt in ("a", "b", "a", "b")]
    seen.append(look(pipeline, images))
    assert [one.prefill for one in seen] == [one.decode for one in seen] == [one.usage for one in seen]
    assert [one.prefill > 0 for one in seen] == [False, False, True, True, False]
    for one in seen:
        assert_equal(one, expected)


def test_long_texts_hit_on_both_stages(pipeline: Running) -> None:
    question = "How many digits are in the picture, and which of them is the largest? " * 6
    first, again = look(pipeline, [], question), look(pipeline, [], question)
    assert (first.prefill, first.decode) == (0, 0)
    assert again.usage == again.prefill == again.decode == (first.num_prompt_tokens - 1) // BLOCK * BLOCK > 0
    assert_equal(again, first)


def test_equal_prompts_at_the_same_time_have_equal_answers(pipeline: Running) -> None:
    images = [scribble(260), scribble(261)]
    expected = fresh(pipeline, images)
    body = chat(QUESTION, images, max_tokens=6, ignore_eos=True)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(pipeline.http, body), range(8)))
    assert [tokens(one)[0][0] for one in answers] == [expected.token_ids] * 8


def test_a_streamed_answer_tells_the_same_number_of_cached_tokens(pipeline: Running) -> None:
    images = [scribble(270), scribble(271)]
    body = chat(QUESTION, images, stream=True, stream_options={"include_usage": True})
    told = []
    for _ in range(2):
        reply = pipeline.http.post("/v1/chat/completions", json=body)
        chunks = [line[6:] for line in reply.text.splitlines() if line.startswith("data: {")]
        usage = msgspec.json.decode(chunks[-1])["usage"]
        told.append((usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]))
    assert told == [(told[0][0], 0), (told[0][0], (told[0][0] - 1) // BLOCK * BLOCK)]

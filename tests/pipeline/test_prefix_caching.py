"""The prefix cache of the prefill worker knows what is in a picture, not only how many tokens it takes."""

from __future__ import annotations

import httpx
import pytest

from tests.pipeline.chats import ask, chat, scribble, tokens
from tests.pipeline.test_disaggregation import of, story

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

BLOCK = 128
TOLERANCE = 0.03


def body(first: int) -> dict:
    """Four pictures of one size; which ones does not show in the tokens."""
    pictures = [scribble(7000 + seed) for seed in (first, 1, 2, 3)]
    return chat("List the digits.", pictures, logprobs=True, ignore_eos=True, max_tokens=16)


def cached(epd: httpx.Client, answer: dict) -> int:
    """How many tokens of the prompt the prefill worker had computed before."""
    [event] = of(story(epd, answer), "prefilled")
    return int(event["detail"].split()[0])


def log_probabilities(answer: dict) -> list[float]:
    return [line["logprob"] for line in answer["choices"][0]["logprobs"]["content"]]


def test_equal_pictures_hit_and_others_with_equal_tokens_do_not(epd: httpx.Client, plain: httpx.Client) -> None:
    first, again, other = (ask(epd, body(seed)) for seed in (10, 10, 11))
    assert first["usage"]["prompt_tokens"] == other["usage"]["prompt_tokens"] > BLOCK
    assert cached(epd, again) >= BLOCK
    assert cached(epd, first) == cached(epd, other) < BLOCK
    assert tokens(first) == tokens(again)
    for answer, seed in ((first, 10), (again, 10), (other, 11)):
        expected = ask(plain, body(seed))
        assert tokens(answer) == tokens(expected)
        assert log_probabilities(answer) == pytest.approx(log_probabilities(expected), abs=TOLERANCE)

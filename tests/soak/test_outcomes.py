from __future__ import annotations

import json

import pytest

from tests.soak.outcomes import CANCELLED, ERROR, RIGHT, UNEXPLAINED, WRONG, Answer, judge

TRUTH = [([1, 2, 3], "abc", "length")]


def whole(ids: list[int], text: str = "abc", reason: str = "length") -> Answer:
    answer = Answer()
    choice = {"index": 0, "token_ids": ids, "message": {"content": text}, "finish_reason": reason}
    answer.take_body({"id": "x", "choices": [choice]})
    return answer


def streamed(*chunks: tuple[list[int], str, str | None], end: str = "data: [DONE]") -> Answer:
    answer = Answer()
    for ids, text, reason in chunks:
        choice = {"index": 0, "token_ids": ids, "delta": {"content": text}, "finish_reason": reason}
        answer.take_event("data: " + json.dumps({"id": "x", "choices": [choice]}))
    answer.take_event(end)
    return answer


def error(kind: str, message: str = "why") -> str:
    return "data: " + json.dumps({"error": {"type": kind, "message": message}})


@pytest.mark.parametrize("answer", [whole([1, 2, 3]), streamed(([1], "a", None), ([2, 3], "bc", "length"))])
def test_the_true_answer_is_right_whole_or_streamed(answer: Answer) -> None:
    assert judge(answer, 200, TRUTH, cancels=False) == (RIGHT, "")


@pytest.mark.parametrize(
    "answer",
    [whole([1, 2, 4]), whole([1, 2, 3], reason="stop"), streamed(([1, 2], "ab", "length")), whole([1, 2, 3], "abd")],
    ids=["another token", "another reason", "a token missing", "another text"],
)
def test_any_difference_is_wrong(answer: Answer) -> None:
    assert judge(answer, 200, TRUTH, cancels=False)[0] == WRONG


def test_an_explicit_error_is_an_error_unless_what_came_before_it_was_wrong() -> None:
    assert judge(streamed(([1], "a", None), end=error("worker_lost")), 200, TRUTH, cancels=False) == (
        ERROR,
        "worker_lost",
    )
    assert judge(streamed(([2], "b", None), end=error("worker_lost")), 200, TRUTH, cancels=False)[0] == WRONG


def test_an_end_without_a_reason_is_unexplained() -> None:
    assert judge(streamed(([1], "a", None), end=""), 200, TRUTH, cancels=False)[0] == UNEXPLAINED
    assert judge(streamed(end=error("worker_lost", "")), 200, TRUTH, cancels=False)[0] == UNEXPLAINED
    body = Answer()
    body.take_body({"error": {"type": "BadRequest", "message": "x"}})
    assert judge(body, 400, TRUTH, cancels=False)[0] == UNEXPLAINED, "no client here asks for anything bad"


def test_a_cancelled_request_may_end_early_but_not_wrongly() -> None:
    early = streamed(([1], "a", "abort"))
    assert judge(early, 200, TRUTH, cancels=True) == (CANCELLED, "")
    assert judge(early, 200, TRUTH, cancels=False)[0] == WRONG
    assert judge(streamed(([2], "b", "abort")), 200, TRUTH, cancels=True)[0] == WRONG

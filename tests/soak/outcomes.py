"""What became of each request of a soak, and whether that may be: pure, but for the HTTP replies it reads."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

# How a request may end. The others ("wrong", "unexplained", "hung") are what a soak is there to find.
RIGHT, ERROR, LEFT, CANCELLED = "right", "error", "left", "cancelled"
WRONG, UNEXPLAINED, HUNG = "wrong", "unexplained", "hung"
BAD = (WRONG, UNEXPLAINED, HUNG)

Choices = list[tuple[list[int], str, str]]


@dataclasses.dataclass
class Outcome:
    """The end of one request: `detail` is the error's type, or what is wrong with it."""

    number: int
    kind: str
    detail: str = ""
    request_id: str = ""
    took_s: float = 0.0

    @property
    def name(self) -> str:
        """What the summary counts it as."""
        return f"{self.kind}: {self.detail}" if self.kind == ERROR else self.kind


@dataclasses.dataclass
class Answer:
    """What a client has received: choices as (token ids, text, finish reason), or an error."""

    choices: dict[int, tuple[list[int], str, str]] = dataclasses.field(default_factory=dict)
    error: dict[str, Any] | None = None
    request_id: str = ""
    done: bool = False

    def take_event(self, line: str) -> None:
        """Takes in one line of an event stream."""
        if not line.startswith("data: "):
            return
        if line == "data: [DONE]":
            self.done = True
            return
        event = json.loads(line.removeprefix("data: "))
        if "error" in event:
            self.error = event["error"]
            return
        self.request_id = event.get("id", self.request_id)
        for choice in event["choices"]:
            ids, text, reason = self.choices.get(choice["index"], ([], "", ""))
            ids = [*ids, *(choice.get("token_ids") or [])]
            text += choice["delta"].get("content") or ""
            self.choices[choice["index"]] = (ids, text, choice["finish_reason"] or reason)

    def take_body(self, body: dict[str, Any]) -> None:
        """Takes in a whole answer."""
        self.done = True
        if "error" in body:
            self.error = body["error"]
            return
        self.request_id = body["id"]
        for one in body["choices"]:
            self.choices[one["index"]] = (one["token_ids"], one["message"]["content"], one["finish_reason"])

    def in_order(self) -> Choices:
        """The choices by index."""
        return [self.choices[index] for index in sorted(self.choices)]


def judge(answer: Answer, status: int, truth: Choices, *, cancels: bool) -> tuple[str, str]:
    """Kind and detail of the outcome of an answer that has ended by itself.

    Args:
        answer: what came.
        status: the HTTP status.
        truth: what plain vLLM answers.
        cancels: whether this client has asked for its request to be cancelled, so that it may end early.
    """
    if answer.error is not None:
        kind, message = answer.error.get("type"), answer.error.get("message")
        if not kind or not message:
            return UNEXPLAINED, f"status {status}: {answer.error}"
        if cancels and str(kind) == "cancelled":
            return CANCELLED, ""
        if status not in (200, 429, 500, 502, 503, 504):
            return UNEXPLAINED, f"status {status}: {answer.error}"
        wrong = _wrong_prefix(answer, truth)
        return (WRONG, wrong) if wrong else (ERROR, str(kind))
    if status != 200 or not answer.done:
        return UNEXPLAINED, f"status {status}, ended without an error or a last event"
    if answer.in_order() == truth:
        return RIGHT, ""
    if cancels and not _wrong_prefix(answer, truth):
        return CANCELLED, ""
    return WRONG, f"{answer.in_order()} instead of {truth}"


def _wrong_prefix(answer: Answer, truth: Choices) -> str:
    """What a stream has said before its error must be a beginning of the truth."""
    for index, (ids, text, _) in answer.choices.items():
        true_ids, true_text, _ = truth[index]
        if ids != true_ids[: len(ids)] or not true_text.startswith(text):
            return f"began with {ids} {text!r} instead of {true_ids} {true_text!r}"
    return ""

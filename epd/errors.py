"""Why a request ends without an answer: the stable codes of FAILED and the HTTP status each one has.

Lives in every process; pure. Also how any exception is told in one line.
"""

from __future__ import annotations

import enum
from typing import Any


class ErrorCode(enum.StrEnum):
    """Stable words for clients and metrics; `HTTP_STATUS` maps each to its status."""

    OVERLOADED = "overloaded"
    NOT_READY = "not_ready"
    TOO_LARGE = "too_large"
    DUPLICATE = "duplicate_request"
    DEADLINE = "deadline_exceeded"
    WORKER_LOST = "worker_lost"
    ENCODE_FAILED = "encode_failed"
    ENGINE_FAILED = "engine_failed"
    PREEMPTED = "preempted"
    SHUTTING_DOWN = "shutting_down"
    BROKER_LOST = "broker_lost"
    PIXELS_NEEDED = "pixels_needed"
    CANCELLED = "cancelled"
    SLOW_CLIENT = "slow_client"


HTTP_STATUS: dict[ErrorCode, int] = {
    ErrorCode.OVERLOADED: 503,
    ErrorCode.NOT_READY: 503,
    ErrorCode.TOO_LARGE: 400,
    ErrorCode.DUPLICATE: 409,
    ErrorCode.DEADLINE: 504,
    ErrorCode.WORKER_LOST: 502,
    ErrorCode.ENCODE_FAILED: 502,
    ErrorCode.ENGINE_FAILED: 500,
    ErrorCode.PREEMPTED: 503,
    ErrorCode.SHUTTING_DOWN: 503,
    ErrorCode.BROKER_LOST: 503,
    ErrorCode.PIXELS_NEEDED: 503,
    # nginx's word for a request that nobody waits for; OpenAI's clients do not try it again, as they would 408 and 409
    ErrorCode.CANCELLED: 499,
    ErrorCode.SLOW_CLIENT: 408,
}

_LINE_CHARS, _INPUT_CHARS = 500, 60


def one_line(error: BaseException) -> str:
    """What an exception says, in one line; of pydantic's, each complaint, with its input where that is short."""
    complaints = getattr(error, "errors", None)
    if callable(complaints):
        try:
            said = [_complaint(each) for each in complaints()]
        except (TypeError, KeyError, ValueError):
            said = []
        if said:
            return "; ".join(said)[:_LINE_CHARS]
    return (" ".join(str(error).split()) or type(error).__name__)[:_LINE_CHARS]


def _complaint(each: dict[str, Any]) -> str:
    where = ".".join(str(part) for part in each["loc"])
    what = " ".join(str(each["msg"]).removeprefix("Value error, ").split())
    given = each.get("input")
    if isinstance(given, str | int | float) and len(str(given)) <= _INPUT_CHARS:
        what += f" (it is {given!r})"
    return f"{where}: {what}" if where else what

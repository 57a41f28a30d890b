"""Why a request ends without an answer: the stable codes of FAILED and the HTTP status each one has.

Lives in the broker and the endpoint; pure.
"""

from __future__ import annotations

import enum


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

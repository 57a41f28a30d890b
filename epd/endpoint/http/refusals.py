"""The answer to a request that is refused before anything was done for it.

Lives in the endpoint process; pure.
"""

from __future__ import annotations

from epd.endpoint.http.failures import RETRY_AFTER_S, failure_of
from epd.errors import ErrorCode


class RefusedError(Exception):
    """The request is refused; `failure` is the answer."""

    def __init__(self, code: ErrorCode, message: str, retry_after_s: float = RETRY_AFTER_S) -> None:
        super().__init__(message)
        self.failure = failure_of(code, message, retry_after_s)

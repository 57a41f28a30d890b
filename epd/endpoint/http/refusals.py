"""The answer to a request that is the client's fault.

Lives in the endpoint process; pure.
"""

from __future__ import annotations

from epd.endpoint.http.failures import failure_of
from epd.errors import ErrorCode


class RefusedError(Exception):
    """The request is the client's fault; `failure` is the answer."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.failure = failure_of(code, message)

"""The answer to a request that is the client's fault.

Lives in the endpoint process; pure.
"""

from __future__ import annotations

from epd.endpoint.http.failures import Failure


class RefusedError(Exception):
    """The request is the client's fault; `failure` is the answer."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.failure = Failure(code=code, message=message, status=status)

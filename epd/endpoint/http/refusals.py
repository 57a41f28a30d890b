"""The answer to a request that is the client's fault.

Lives in the endpoint process; pure.
"""

from __future__ import annotations

from typing import Self

from epd.endpoint.http.failures import Failure


class RefusedError(Exception):
    """The request is the client's fault; `failure` is the answer."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.failure = Failure(code=code, message=message, status=status)

    @classmethod
    def of(cls, failure: Failure) -> Self:
        """One with this answer, such as that there is no room now."""
        error = cls(failure.status, failure.code, failure.message)
        error.failure = failure
        return error

"""Everything the client raises on purpose, as one tree.

* EPDError
  * APIError: the server answered with an error; used itself for 408, 409, 499 and what is not below
    * BadRequest: 400, 413, 422: the request itself must change
    * AuthenticationError: 401, 403: the API key is missing or wrong
    * NotFound: 404: no such model, request or page
    * Overloaded: 429, 503: come back later, see ``retry_after_s``
    * ServerError: any other 5xx: the server failed, the request may be fine
  * TransportError: there is no complete answer
    * ConnectFailed: nothing listens there, or the name or certificate is wrong
    * Timeout: also a ``TimeoutError``; the subclass says which clock ran out
      * ConnectTimeout: ``Timeouts.connect_s``
      * FirstTokenTimeout: ``Timeouts.first_token_s``
      * TokenTimeout: ``Timeouts.token_s``, the gap between two chunks
      * TotalTimeout: ``Timeouts.total_s``
    * StreamInterrupted: the connection ended before the answer did
  * PictureError: also a ``ValueError``; a picture, video or sound cannot be read or sent

Misuse of the Python API itself (a closed client, unknown or contradicting arguments) raises the built-in
``RuntimeError``, ``TypeError`` or ``ValueError``. Lives in the user's process; pure.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

from epd.client.types import read_json
from epd.errors import ErrorCode

__all__ = [
    "APIError",
    "AuthenticationError",
    "BadRequest",
    "ConnectFailed",
    "ConnectTimeout",
    "EPDError",
    "FirstTokenTimeout",
    "NotFound",
    "Overloaded",
    "PictureError",
    "ServerError",
    "StreamInterrupted",
    "Timeout",
    "TokenTimeout",
    "TotalTimeout",
    "TransportError",
]
# error_from_answer, api_error and class_of are for this package and the documentation: they build errors.

_PASSING = (429, 502, 503)  # from a server that sends none of our codes
_QUOTED_CHARS = 300  # how much of an answer that is not JSON goes into the message


class EPDError(Exception):
    """Base of everything this client raises on purpose."""


class APIError(EPDError):
    """The server answered with an error.

    Attributes:
        status: HTTP status; for an error inside a stream, the one the error object names, else 500.
        code: The error object's ``code``, as sent (vLLM sends the status as a number).
        message: The server's sentence.
        request_id: The server's id of the request, if it gave one.
        body: The decoded JSON body, or the text when it was not JSON.
    """

    def __init__(
        self,
        status: int,
        code: str | int | None,
        message: str,
        request_id: str | None = None,
        body: Any = None,
    ) -> None:
        super().__init__(status, code, message, request_id, body)
        self.status = status
        self.code = code
        self.message = message
        self.request_id = request_id
        self.body = body

    @property
    def reason(self) -> ErrorCode | str | None:
        """The stable word for what is wrong (``docs/errors.md``): EPD's as an ``ErrorCode``, else vLLM's, or None."""
        error = self.body.get("error", self.body) if isinstance(self.body, dict) else None
        word = error.get("type") if isinstance(error, dict) else None
        if word == "error" and isinstance(error, dict):  # an event of /v1/responses
            word = error.get("code")
        with contextlib.suppress(ValueError):
            return ErrorCode(str(word))
        return word if isinstance(word, str) else None

    @property
    def may_retry(self) -> bool:
        """Whether the same request is likely to be answered a little later."""
        reason = self.reason
        return reason.retry if isinstance(reason, ErrorCode) else self.status in _PASSING

    def __str__(self) -> str:
        """Return the message with its status and request id."""
        where = f", request {self.request_id}" if self.request_id else ""
        return f"{self.message} (status {self.status}{where})"


class BadRequest(APIError):
    """400, 413 or 422: the request must change before it can succeed."""


class AuthenticationError(APIError):
    """401 or 403: the API key is missing, wrong or not allowed to do this."""


class NotFound(APIError):
    """404: no such model, request or page."""


class Overloaded(APIError):
    """429 or 503: the server refuses work for now.

    Attributes:
        retry_after_s: Seconds the server asks to wait (``Retry-After``), or None if it did not say.
    """

    def __init__(
        self,
        status: int,
        code: str | int | None,
        message: str,
        request_id: str | None = None,
        body: Any = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(status, code, message, request_id, body)
        self.args = (*self.args, retry_after_s)  # so that pickling keeps it
        self.retry_after_s = retry_after_s


class ServerError(APIError):
    """5xx other than 503: the server failed."""


class TransportError(EPDError):
    """There is no complete answer.

    Attributes:
        request_id: The server's id of the request, if it was already known.
    """

    def __init__(self, message: str, *, request_id: str | None = None) -> None:
        super().__init__(message)
        self.request_id = request_id


class ConnectFailed(TransportError):
    """No connection: refused, unknown host, or an invalid certificate."""


class Timeout(TransportError, TimeoutError):
    """One of the clocks in ``Timeouts`` ran out; the connection has been closed."""


class ConnectTimeout(Timeout):
    """No connection within ``Timeouts.connect_s``."""


class FirstTokenTimeout(Timeout):
    """No token within ``Timeouts.first_token_s`` of sending the request."""


class TokenTimeout(Timeout):
    """Nothing for ``Timeouts.token_s`` after some tokens had come."""


class TotalTimeout(Timeout):
    """The whole call took longer than ``Timeouts.total_s``."""


class StreamInterrupted(TransportError):
    """The connection ended before the answer did; what came so far is incomplete."""


class PictureError(EPDError, ValueError):
    """A picture, video or sound cannot be read, is of an unknown kind, or cannot be sent."""


def error_from_answer(status: int, headers: Mapping[str, str], body: bytes) -> APIError:
    """Turn an HTTP error answer into the exception for its status.

    Args:
        status: HTTP status, 300 or above.
        headers: The answer's headers; ``Retry-After`` and ``X-Request-Id`` are read.
        body: The answer's body, in whatever form.
    """
    try:
        decoded: Any = read_json(body)
    except ValueError:
        decoded = body.decode("utf-8", "replace")
    return api_error(
        status,
        decoded,
        request_id=headers.get("X-Request-Id"),
        retry_after_s=_retry_after_s(headers.get("Retry-After")),
    )


def api_error(
    status: int | None,
    body: Any,
    *,
    request_id: str | None = None,
    retry_after_s: float | None = None,
) -> APIError:
    """Build the exception for an error body, in OpenAI's form or any other.

    Args:
        status: HTTP status, or None to take it from the error object (an error in a stream).
        body: Decoded JSON, or text.
        request_id: The server's id of the request.
        retry_after_s: What ``Retry-After`` said, in seconds.
    """
    error: Any = body
    if isinstance(body, dict):
        error = body.get("error", body)
    code: str | int | None = None
    if isinstance(error, dict):
        given = error.get("code")
        code = given if isinstance(given, str | int) else None
        message = error.get("message") or error.get("detail") or f"the server sent no message: {error}"
    else:
        message = error
    if status is None:
        status = _status_of(code)
    text = str(message).strip()
    if not isinstance(body, dict):
        text = text[:_QUOTED_CHARS]
    text = text or "the server gave no reason"
    if status in (429, 503):
        return Overloaded(status, code, text, request_id, body, retry_after_s)
    return class_of(status)(status, code, text, request_id, body)


def _status_of(code: str | int | None) -> int:
    """Return the status for a code: vLLM sends the status itself, EPD its own words."""
    with contextlib.suppress(ValueError):
        return ErrorCode(str(code)).status
    digits = str(code)
    return int(digits) if digits.isdecimal() and 400 <= int(digits) <= 599 else 500


def class_of(status: int) -> type[APIError]:
    """The class of errors for an HTTP status."""
    if status in (429, 503):
        return Overloaded
    if status in (400, 413, 422):
        return BadRequest
    if status in (401, 403):
        return AuthenticationError
    if status == 404:
        return NotFound
    return ServerError if status >= 500 else APIError


def _retry_after_s(value: str | None) -> float | None:
    """Read ``Retry-After``: seconds or an HTTP date (RFC 9110, 10.2.3)."""
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(0.0, (when - datetime.now(UTC)).total_seconds())

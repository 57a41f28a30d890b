"""One HTTP request and its answer, as the rest of the endpoint sees them.

Lives in the endpoint process; plain values, and the context variable through which code finds the current exchange.
"""

from __future__ import annotations

import contextvars
import dataclasses
import time
from typing import TYPE_CHECKING

import msgspec

from epd.errors import ErrorCode

if TYPE_CHECKING:
    from epd.endpoint.http.failures import Failure

SCOPE_KEY = "epd.exchange"
"""Where an ASGI scope has its exchange, for what runs around the application."""


@dataclasses.dataclass(slots=True, kw_only=True)
class Part:
    """One of the pipeline's requests that an exchange has made, and how far it has come.

    Attributes:
        request_id: the pipeline's id.
        client_id: the id that the client knows.
        num_prompt_tokens: tokens of its prompt, of which `num_cached_tokens` were cached (-1 while that is unknown).
        num_patches: patches of its media.
        num_output_tokens: how many have come.
        first_at: when the first of them came, on the monotonic clock; 0 before that.
    """

    request_id: str
    client_id: str
    num_prompt_tokens: int = 0
    num_cached_tokens: int = -1
    num_patches: int = 0
    num_output_tokens: int = 0
    first_at: float = 0.0


class Exchange:
    """One HTTP request and its answer.

    Attributes:
        owner: a digest of its API key, or nothing.
        name: its `X-Request-Id`.
        failure: why it fails; the first reason stays.
        has_submitted: whether anything of it was given to the pipeline.
        has_own_options: whether it chose how its media are processed; the encoder may refuse the result.
        began_at: when it came, on the monotonic clock.
        parts: the pipeline's requests that it has made.
    """

    def __init__(self, owner: str = "", name: str = "") -> None:
        self.owner, self.name = owner, name
        self.failure: Failure | None = None
        self.has_submitted = self.has_own_options = False
        self.began_at = time.monotonic()
        self.parts: list[Part] = []

    def note(self, failure: Failure) -> None:
        """Notes why it fails, unless it has failed already."""
        if failure.code == ErrorCode.ENCODE_FAILED and self.has_own_options:
            text = "the model cannot encode what the request's mm_processor_kwargs make of its media"
            told, code = f"{text}: {failure.message}", ErrorCode.INVALID_REQUEST
            failure = msgspec.structs.replace(failure, code=code, message=told, status=code.status, retry_after_s=0.0)
        if self.failure is None:
            self.failure = failure


current_exchange: contextvars.ContextVar[Exchange | None] = contextvars.ContextVar("exchange", default=None)

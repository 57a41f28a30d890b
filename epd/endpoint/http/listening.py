"""The aiohttp server under the ASGI bridge: which requests it reads, and what it answers to those it cannot read.

Lives in the endpoint process; owns nothing. Request lines and headers are accepted as browsers and gateways send
them; what is not HTTP, or too large, is answered in the API's own shape. Knows nothing of vLLM.
"""

from __future__ import annotations

import json

import structlog
from aiohttp import http_exceptions, web

from epd.endpoint.http.asgi import AsgiBridge
from epd.endpoint.http.failures import Failure, failure_of
from epd.errors import ErrorCode

log = structlog.get_logger()

# For the request line and each header; for the number of headers; for all headers together.
_MAX_FIELD_BYTES = 64 << 10
_MAX_HEADERS = 256
_MAX_HEADER_BYTES = 128 << 10


class _Protocol(web.RequestHandler):
    """One connection."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what cannot be read, or to an exception of our code; the last one on its connection."""
        if request.writer.output_size > 0:
            raise ConnectionError("part of the answer was sent already")
        if status >= 500:
            log.error("a request could not be handled", exc_info=exc)
            return _refusal(failure_of(ErrorCode.ENGINE_FAILED, "internal server error"))
        text = " ".join((message or str(exc)).split())[:200]
        if isinstance(exc, http_exceptions.LineTooLong) or "Too many headers" in text:
            return _refusal(failure_of(ErrorCode.HEADERS_TOO_LARGE, text))
        return _refusal(failure_of(ErrorCode.INVALID_HTTP, f"the request is not valid HTTP: {text}"))


class _Server(web.Server):
    """Makes a `_Protocol` for each connection."""

    def __call__(self) -> web.RequestHandler:
        return _Protocol(self, loop=self._loop, **self._kwargs)


def runner_of(bridge: AsgiBridge, shutdown_timeout_s: float) -> web.ServerRunner:
    """A runner that serves `bridge` once it is set up and has a site; needs the running event loop."""

    async def handle(request: web.BaseRequest) -> web.StreamResponse:
        num_bytes = sum(len(name) + len(value) for name, value in request.raw_headers)
        if num_bytes > _MAX_HEADER_BYTES:
            text = f"the headers have {num_bytes} bytes; at most {_MAX_HEADER_BYTES} are accepted"
            return _refusal(failure_of(ErrorCode.HEADERS_TOO_LARGE, text))
        expected = request.headers.get("Expect", "").lower()
        if expected == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0  # that was not the answer yet
        elif expected:
            text = f"Expect: {expected[:64]} is not supported"
            return _refusal(failure_of(ErrorCode.EXPECTATION_FAILED, text))
        return await bridge.handle(request)

    server = _Server(
        handle,
        handler_cancellation=True,
        access_log=None,
        auto_decompress=False,
        max_line_size=_MAX_FIELD_BYTES,
        max_field_size=_MAX_FIELD_BYTES,
        max_headers=_MAX_HEADERS,
    )
    return web.ServerRunner(server, shutdown_timeout=shutdown_timeout_s)


def _refusal(failure: Failure) -> web.Response:
    body = json.dumps(failure.body("")).encode()
    response = web.Response(status=failure.status, body=body, content_type="application/json")
    response.force_close()
    return response

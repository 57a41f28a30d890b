"""One HTTP session to an endpoint: requests out, answers in, each wait under a clock.

Lives in the user's process; owns one aiohttp session.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import aiohttp
from yarl import URL

from epd.client.errors import APIError, Overloaded, TotalTimeout, error_from_answer
from epd.client.transport import Limit, transport_errors, until
from epd.client.types import Timeouts, read_json


class Connection:
    """Sends requests to one endpoint, between ``open`` and ``close``.

    Args:
        base_url: Where the endpoint listens, with or without ``/v1``.
        api_key: Sent as a bearer token.
        timeouts: The clocks of every call.

    Raises:
        ValueError: ``base_url`` is not an http or https URL.
    """

    def __init__(self, base_url: str, api_key: str | None, timeouts: Timeouts) -> None:
        if not _is_http_url(base_url):
            raise ValueError(f"base_url must look like http://host:port, not {base_url!r}")
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self._timeouts = timeouts
        self._headers = {"Content-Type": "application/json", "User-Agent": "epd-client"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._session: aiohttp.ClientSession | None = None

    def open(self) -> None:
        """Make the session; once."""
        if self._session is not None:
            raise RuntimeError("this client is already open")
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),  # a queue in here would use up the connect clock
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(
                total=None, connect=self._timeouts.connect_s, sock_connect=self._timeouts.connect_s
            ),
        )

    async def close(self) -> None:
        """Close every connection; calls in progress fail. May be called again."""
        if self._session is not None:
            await self._session.close()

    async def send(
        self,
        method: str,
        path: str,
        limit: Limit,
        payload: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> aiohttp.ClientResponse:
        """Send a request and return the response once its headers say 2xx."""
        if self._session is None:
            raise RuntimeError("open the client first: async with AsyncClient() as client")
        if self._session.closed:
            raise RuntimeError("this client is closed")
        url = URL(self.base_url + path, encoded=True)
        async with until(limit):
            with transport_errors(self.base_url, self._timeouts):
                response = await self._session.request(
                    method, url, data=payload, headers=headers, allow_redirects=False
                )
        if response.status >= 300:
            body = await self._read(response, limit)
            raise error_from_answer(response.status, response.headers, body)
        return response

    async def json(self, response: aiohttp.ClientResponse, limit: Limit) -> Any:
        """Read a response to its end and decode it."""
        body = await self._read(response, limit)
        try:
            return read_json(body)
        except ValueError as error:
            raise self.not_ours(body.decode("utf-8", "replace")) from error

    async def small(self, method: str, path: str) -> Any:
        """Send a request that is answered at once, and return its JSON."""
        limit = self.small_limit()
        return await self.json(await self.send(method, path, limit), limit)

    async def small_object(self, method: str, path: str) -> dict[str, Any]:
        """As ``small``, for an answer that must be a JSON object."""
        raw = await self.small(method, path)
        if not isinstance(raw, dict):
            raise self.not_ours(raw)
        return raw

    async def is_up(self, path: str) -> bool:
        """Return whether a page answers 2xx; False if it answers 503."""
        try:
            (await self.send("GET", path, self.small_limit())).release()
        except Overloaded:
            return False
        return True

    def small_limit(self) -> Limit:
        """The clock, starting now, of a call that is answered at once."""
        seconds = min(self._timeouts.token_s, self._timeouts.total_s)
        at = asyncio.get_running_loop().time() + seconds
        return Limit(at, TotalTimeout, f"no answer within {seconds:g} s (the smaller of token_s and total_s)")

    def not_ours(self, body: Any) -> APIError:
        """The error for an answer that no endpoint would give."""
        message = f"what answers at {self.base_url} does not speak the OpenAI API"
        return APIError(200, "invalid_answer", message, None, body)

    async def _read(self, response: aiohttp.ClientResponse, limit: Limit) -> bytes:
        request_id = response.headers.get("X-Request-Id")
        try:
            async with until(limit, request_id):
                with transport_errors(self.base_url, self._timeouts, request_id):
                    return await response.read()
        finally:
            response.release()  # closes the connection if the body was not read to its end


def _is_http_url(url: str) -> bool:
    try:
        parsed = URL(url)
    except ValueError:  # for example a port beyond 65535
        return False
    return parsed.scheme in ("http", "https") and bool(parsed.host)

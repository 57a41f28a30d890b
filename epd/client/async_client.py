"""The asynchronous client. Lives in the user's process; owns one connection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from types import TracebackType
from typing import Any, NamedTuple, Self, Unpack
from urllib.parse import quote

import aiohttp

from epd.client.arguments import Arguments
from epd.client.chat import Chat
from epd.client.connection import Connection
from epd.client.errors import NotFound
from epd.client.pictures import LocalPicture, Picture, media_type
from epd.client.reuse import Reuse, is_not_found
from epd.client.transport import AnswerReader, Limit, first_token_limit, total_limit
from epd.client.types import Chunk, Completion, Media, Timeouts

__all__ = ["AsyncClient"]

_CHAT = "/v1/chat/completions"
_MEDIA = "/v1/media"


class _Call(NamedTuple):
    """A chat that is ready to be sent, and the uploads that its body refers to."""

    chat: Chat
    payload: bytes
    referred: list[str]


class AsyncClient:
    """Talks to an EPD endpoint; use it as ``async with AsyncClient() as client``.

    Calls may run concurrently, as many as you like. Nothing is retried: see ``Overloaded``.

    Args:
        base_url: Where the endpoint listens, with or without ``/v1``.
        api_key: Sent as a bearer token.
        model: The model of calls that name none; without it the server uses its own.
        timeouts: The clocks of every call.
        reuse_pictures: Upload a picture when it is used a second time (recognised by its content), and refer to it
            from then on. If the server refuses that, the picture is sent each time.

    Raises:
        ValueError: ``base_url`` is not an http or https URL.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:8400",
        *,
        api_key: str | None = None,
        model: str | None = None,
        timeouts: Timeouts = Timeouts(),  # noqa: B008 - immutable
        reuse_pictures: bool = True,
    ) -> None:
        self._http = Connection(base_url, api_key, timeouts)
        self.base_url = self._http.base_url
        self.model = model
        self.timeouts = timeouts
        self._reuse = Reuse() if reuse_pictures else None

    async def __aenter__(self) -> Self:
        self._http.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close every connection; calls in progress fail. May be called again."""
        await self._http.close()

    def generate(self, /, prompt: str | None = None, **arguments: Unpack[Arguments]) -> Coroutine[Any, Any, Completion]:
        """Ask, and wait for the whole answer.

        Arguments are checked and iterables are read once, when this is called; the rest happens when it is awaited.

        Args:
            prompt: The question.
            arguments: These, and the others in ``epd.client.arguments``: vLLM's fields, sent as they are.

                * ``images``: One picture or any iterable of them: paths, URLs, bytes, open files, PIL images, numpy
                  arrays or uploads; they precede the text.
                * ``videos``, ``audios``: One clip or any iterable of them: paths, URLs, bytes or open files.
                * ``model``: Instead of the client's model.
                * ``max_tokens``: The longest answer, in tokens.
                * ``temperature``: 0 always takes the likeliest token.
                * ``top_p``: Sample among the likeliest tokens that make up this probability.
                * ``seed``: Makes sampling repeatable.
                * ``stop``: End the answer before any of these strings.
                * ``n``: Number of answers, see ``Completion.texts``.
                * ``logprobs``: True, or how many alternatives to report for each token.
                * ``system``: The text of a system message that goes first.
                * ``messages``: A whole OpenAI chat instead of ``prompt`` and media; a content part may be
                  ``{"type": "image", "image": picture}``, and likewise for ``video`` and ``audio``.
                * ``extra_body``: Fields of the body that only the server knows.

        Raises:
            APIError: The server answered with an error; see its subclasses.
            TransportError: There is no complete answer; see its subclasses.
            PictureError: A picture or clip cannot be read.
            TypeError: An argument is unknown or of the wrong kind, or contradicts another.
            ValueError: A value cannot be sent.
        """
        return self._generate(Chat(prompt, arguments, model=self.model))

    def stream(self, /, prompt: str | None = None, **arguments: Unpack[Arguments]) -> AsyncGenerator[Chunk, None]:
        """Ask, and iterate over the answer as it is generated. Takes the arguments of ``generate``.

        Nothing is sent before the first step. Closing the iterator (``aclose``, or dropping it after
        a ``break``) closes the connection, and the server cancels the request.

        Raises:
            APIError: The server answered with an error, at once or in the middle of the stream.
            TransportError: There is no complete answer; what came so far is incomplete.
            PictureError, TypeError, ValueError: As for ``generate``.
        """
        return self._stream(Chat(prompt, arguments, model=self.model, stream=True))

    async def upload(self, /, picture: Picture, *, cache_salt: str = "") -> Media:
        """Have a picture encoded before it is asked about; the result stands for the picture until it expires.

        Args:
            picture: A path, bytes, an open file, a PIL image or a numpy array.
            cache_salt: The ``cache_salt`` of the calls that will use it, if they have one.

        Raises:
            Overloaded: No more pictures can be kept now, see ``retry_after_s``.
            APIError, TransportError: As for ``generate``.
            PictureError: The picture cannot be read, or is an address.
        """
        local = LocalPicture(picture)
        await asyncio.to_thread(local.load)
        file = await asyncio.to_thread(local.file)
        return await self._upload(file, cache_salt, total_limit(self.timeouts, asyncio.get_running_loop().time()))

    async def models(self, /) -> list[str]:
        """Return the ids of the models that the server offers.

        Raises:
            APIError, TransportError: As for ``generate``.
        """
        raw = await self._http.small("GET", "/v1/models")
        try:
            return [str(model["id"]) for model in raw["data"]]
        except (KeyError, TypeError) as error:
            raise self._http.not_ours(raw) from error

    async def health(self, /) -> bool:
        """Return whether the server is alive (``GET /health``); False if it answers 503.

        Raises:
            APIError, TransportError: As for ``generate``; a server that is not there is a ``ConnectFailed``.
        """
        return await self._http.is_up("/health")

    async def ready(self, /) -> bool:
        """Return whether the server can take requests now (``GET /ready``); False if it answers 503.

        Raises:
            APIError, TransportError: As for ``generate``; a server that is not there is a ``ConnectFailed``.
        """
        return await self._http.is_up("/ready")

    async def request(self, /, request_id: str) -> dict[str, Any]:
        """Return what the server knows of a request: its stages, times and workers.

        Raises:
            NotFound: It knows no such request.
            APIError, TransportError: As for ``generate``.
        """
        return await self._http.small_object("GET", f"/v1/requests/{quote(request_id, safe='')}")

    async def cancel(self, /, request_id: str) -> int:
        """Cancel a request by the ``id`` of its answer; whoever waits for it gets an ``APIError`` with status 499.

        Returns:
            How many sequences were still being generated: 0 if it had ended, else up to ``n``.

        Raises:
            NotFound: The server knows no such request with this API key.
            APIError, TransportError: As for ``generate``.
        """
        raw = await self._http.small_object("POST", f"/v1/requests/{quote(request_id, safe='')}/cancel")
        try:
            return int(raw["cancelled"])
        except (KeyError, TypeError, ValueError) as error:
            raise self._http.not_ours(raw) from error

    async def cache(self) -> dict[str, Any]:
        """Return how the pools of embeddings are filled (``pools``) and what has happened to them (``counters``).

        Raises:
            APIError, TransportError: As for ``generate``.
        """
        return await self._http.small_object("GET", "/v1/cache")

    async def _generate(self, chat: Chat) -> Completion:
        call = await self._prepare(chat)
        limit = total_limit(self.timeouts, asyncio.get_running_loop().time())
        raw = await self._http.json(await self._send_call(call, limit), limit)
        try:
            return Completion.from_json(raw)
        except ValueError as error:
            raise self._http.not_ours(raw) from error

    async def _stream(self, chat: Chat) -> AsyncGenerator[Chunk, None]:
        call = await self._prepare(chat)
        sent_at = asyncio.get_running_loop().time()
        limit = min(
            first_token_limit(self.timeouts, sent_at),
            total_limit(self.timeouts, sent_at),
            key=lambda limit: limit.at,
        )
        response = await self._send_call(call, limit)
        reader = AnswerReader(
            response, base_url=self.base_url, timeouts=self.timeouts, sent_at=sent_at, num_choices=chat.num_choices
        )
        del chat, call  # they hold every picture
        try:
            while (chunks := await reader.next_chunks()) is not None:
                for chunk in chunks:
                    yield chunk
        finally:
            reader.close()

    async def _prepare(self, chat: Chat) -> _Call:
        """Read the chat's media, upload those that are used again, and write the body."""
        await asyncio.to_thread(chat.load)
        kept: dict[str, str] = {}
        if self._reuse is not None:
            kept = await self._reuse.urls(chat.pictures, chat.cache_salt, self._upload)
        return _Call(chat, await asyncio.to_thread(chat.body, kept), list(kept.values()))

    async def _send_call(self, call: _Call, limit: Limit) -> aiohttp.ClientResponse:
        """Send a chat; again, with all pictures, if the server no longer has one that was uploaded for it."""
        try:
            return await self._http.send("POST", _CHAT, limit, call.payload)
        except NotFound as error:
            if not call.referred or not is_not_found(error) or self._reuse is None:
                raise
            self._reuse.forget(call.referred)
        return await self._http.send("POST", _CHAT, limit, await asyncio.to_thread(call.chat.body))

    async def _upload(self, file: bytes, salt: str, limit: Limit | None = None) -> Media:
        limit = limit or self._http.small_limit()
        path = f"{_MEDIA}?cache_salt={quote(salt, safe='')}" if salt else _MEDIA
        headers = {"Content-Type": media_type(file) or "application/octet-stream"}
        raw = await self._http.json(await self._http.send("POST", path, limit, file, headers), limit)
        try:
            return Media.from_json(raw)
        except ValueError as error:
            raise self._http.not_ours(raw) from error

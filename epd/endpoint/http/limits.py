"""Refuses bad input with a reason before any engine or decoder sees it.

Lives in the endpoint process, as an ASGI middleware inside vLLM's own (so that a client without a key is refused
first). Bodies are bounded, JSON must parse, and every picture, video and sound in it must be fit to be opened: its
address allowed, its header readable (`probing.py`), its size bounded. Nothing is decoded here; media that turn out to
be damaged when they are decoded are answered with 400, too.
"""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from epd.config import EndpointConfig
from epd.endpoint.http import encodings
from epd.endpoint.http.asgi import App, Message, Receive, Scope, Send
from epd.endpoint.http.failures import send_failure
from epd.endpoint.http.refusals import RefusedError
from epd.endpoint.media.addresses import Resolve, addresses_of, check_media
from epd.endpoint.media.bounds import MediaBounds
from epd.endpoint.media.budget import check_request
from epd.endpoint.media.parts import media_in
from epd.endpoint.media.probing import check_image
from epd.endpoint.media.stored_picture import SCHEME, StoredPicture, current_media
from epd.errors import ErrorCode
from epd.multimodal.containers import kind_of

MEDIA_PATH = "/v1/media"
_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})
_THREAD_BYTES = 128 << 10
Medium = tuple[str, str]
FindMedia = Callable[[Scope, str], "StoredPicture | None"]


class Limits:
    """ASGI middleware that reads and checks the body of every request that has one.

    Args:
        app: what to call with a request that passes.
        bounds: for bodies and media.
        resolve: host name -> its addresses, for tests.
        find_media: from an owner and an id to the kept picture that `epd-media://ID` stands for.
    """

    def __init__(
        self,
        app: App,
        bounds: MediaBounds,
        resolve: Resolve | None = None,
        find_media: FindMedia = lambda _scope, _id: None,
    ) -> None:
        self._app, self._bounds, self._config = app, bounds, bounds.config
        self._resolve = resolve or addresses_of
        self._find_media = find_media

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers with the refusal, or runs the application with the body already read."""
        if scope["type"] != "http" or scope["method"] not in _WITH_BODY:
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        try:
            _check_encoding(scope)
            body = await self._read(scope, receive)
            if body is None:
                return
            kept: dict[str, StoredPicture] = {}
            if path == MEDIA_PATH:
                await self._bounds.run(check_upload, body, self._config)
            elif body and _is_json(scope):
                body = as_utf8(body)
                if len(body) < _THREAD_BYTES:
                    media = media_of(path, body, self._config)
                else:
                    media = await asyncio.to_thread(media_of, path, body, self._config)
                kept = await self._check(scope, media)
        except RefusedError as error:
            await send_failure(send, path, error.failure)
            return
        # From here on the request holds what it refers to, whenever that expires.
        token = current_media.set(kept)
        try:
            with self._bounds.budget.share():
                await self._app(scope, _replay(body, receive), send)
        finally:
            current_media.reset(token)

    async def _check(self, scope: Scope, media: list[Medium]) -> dict[str, StoredPicture]:
        """The kept pictures among `media`, by id; files are checked in a thread, where they hold up nobody."""
        kept: dict[str, StoredPicture] = {}
        others = []
        for kind, url in media:
            if kind == "image" and url.startswith(SCHEME):
                media_id = url.removeprefix(SCHEME)
                found = self._find_media(scope, media_id)
                if found is None:
                    raise media_not_found(media_id)
                kept[media_id] = found
            else:
                others.append((kind, url))
        if others:
            await self._bounds.run(check_all, others, self._config, self._resolve)
        return kept

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body, or None if the client went away before its end."""
        limit = self._config.max_body_bytes
        declared = next((v for k, v in scope["headers"] if k == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > limit:
            raise _too_large(int(declared), limit)
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > limit:
                raise _too_large(size, limit)
            chunks.append(chunk)
            if not message.get("more_body", False):
                return b"".join(chunks)


def as_utf8(body: bytes) -> bytes:
    """A JSON body as UTF-8 without a byte order mark, whichever of JSON's encodings it came in.

    Raises:
        RefusedError: it is not in the encoding that its first bytes show.
    """
    if body[:1] in (b"{", b"[") and body[1:2] != b"\0":  # nearly all bodies
        return body
    encoding = json.detect_encoding(body)
    if encoding == "utf-8":
        return body
    try:
        return body.decode(encoding).encode()
    except UnicodeError as error:
        raise RefusedError(ErrorCode.INVALID_JSON, f"the body is not valid {encoding}: {error}") from None


def read_json(body: bytes) -> Any:
    """A JSON body; garbage is not collected meanwhile: deep inside a nested body, finalizers would have no stack left.

    Raises:
        msgspec.DecodeError: it is not JSON.
        UnicodeError: a string in it is not UTF-8.
        RecursionError: it is nested too deeply.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return msgspec.json.decode(body)
    finally:
        if collects:
            gc.enable()


def media_of(path: str, body: bytes, config: EndpointConfig) -> list[Medium]:
    """The (kind, address) of each picture, video and sound of a JSON body; nothing is opened.

    Raises:
        RefusedError: it is not JSON, or has too many media or unknown ones.
    """
    try:
        data = read_json(body)
    except (msgspec.DecodeError, UnicodeError) as error:  # the latter for strings that are not UTF-8
        raise RefusedError(ErrorCode.INVALID_JSON, f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise RefusedError(ErrorCode.INVALID_JSON, "the body is nested too deeply") from None
    if not isinstance(data, dict):
        return []  # vLLM says which fields it expects
    if path.startswith("/inference") and data.get("features"):
        raise RefusedError(ErrorCode.UNSUPPORTED, "ready-made multimodal features are not supported")
    media = [*media_in(data, path)]
    for kind, limit in (("image", config.max_images), ("video", config.max_videos), ("audio", config.max_audios)):
        if sum(each == kind for each, _ in media) > limit:
            raise RefusedError(ErrorCode(f"too_many_{kind}s"), f"more than {limit} {kind}s in one request")
    return media


def check_all(media: Iterable[Medium], config: EndpointConfig, resolve: Resolve) -> None:
    """Checks the addresses of a request's media and the headers of the files that they carry; blocks.

    Raises:
        RefusedError: with the reason.
    """
    num_bytes = 0
    for kind, url in media:
        num_bytes += check_media(kind, url, config, resolve)
        check_request(num_bytes, config.max_request_decoded_bytes)


def media_not_found(media_id: str) -> RefusedError:
    """The answer for an id that is unknown, has expired or belongs to another key."""
    text = f"no picture {media_id[:64]!r} is kept here; it may have expired: upload it again, or send it"
    return RefusedError(ErrorCode.MEDIA_NOT_FOUND, text)


def check_upload(content: bytes, config: EndpointConfig) -> None:
    """Checks the body of an upload, which must be a picture's file.

    Raises:
        RefusedError: with the reason.
    """
    try:
        check_image(content, config)
    except RefusedError as error:
        kind = kind_of(content)
        if error.failure.code == ErrorCode.INVALID_IMAGE and kind and kind != "gif":
            text = "only pictures can be uploaded; send a video or audio file in the request that asks about it"
            raise RefusedError(ErrorCode.UNSUPPORTED, text) from None
        raise


def _is_json(scope: Scope) -> bool:
    content_type: bytes = next((v for k, v in scope["headers"] if k == b"content-type"), b"application/json")
    essence = content_type.partition(b";")[0].strip().lower()
    return essence == b"application/json" or essence.endswith(b"+json")


def _check_encoding(scope: Scope) -> None:
    """Refuses encodings that the server has not undone already."""
    encoding: bytes = next((v for k, v in scope["headers"] if k == b"content-encoding"), b"").strip().lower()
    if encoding not in (b"", b"identity") and encoding.decode("latin-1") not in encodings.KNOWN:
        text = f"Content-Encoding {encoding[:64].decode('latin-1')!r} is not supported; gzip and deflate are"
        raise RefusedError(ErrorCode.UNSUPPORTED_ENCODING, text)


def _too_large(size: int, limit: int) -> RefusedError:
    return RefusedError(ErrorCode.BODY_TOO_LARGE, f"the body has {size} bytes or more; at most {limit} are accepted")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read, then whatever follows."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay

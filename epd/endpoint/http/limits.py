"""Refuses bad input with a reason before any engine or decoder sees it.

Lives in the endpoint process, as an ASGI middleware inside vLLM's own (so that a client without a key is refused
first). Bodies are bounded, JSON must parse, and every picture, video and sound in it must be one that may be opened:
its address allowed, its header read (`probing.py`), its size bounded. Nothing is decoded here; what turns out to be
damaged when it is decoded is answered with 400, too.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import functools
import gc
import ipaddress
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import msgspec

from epd.config import EndpointConfig
from epd.endpoint.http.asgi import App, Message, Receive, Scope, Send
from epd.endpoint.http.failures import send_failure
from epd.endpoint.http.refusals import RefusedError
from epd.endpoint.media.probing import JPEG_FRAMES, check_audio, check_frames, check_image, check_video
from epd.endpoint.media.stored_picture import SCHEME, StoredPicture, current_media
from epd.errors import ErrorCode
from epd.multimodal.containers import kind_of

MAX_DEPTH = 64
MEDIA_PATH = "/v1/media"
_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})
_THREAD_BYTES = 128 << 10
# Where one of these is in a body, there may be a file in it that takes time to look at.
_SLOW = (b"video", b"audio")
_CHECKS = {"image": check_image, "video": check_video, "audio": check_audio}

Resolve = Callable[[str], list[str]]
FindMedia = Callable[[Scope, str], "StoredPicture | None"]


class Limits:
    """ASGI middleware that reads and checks the body of every request that has one.

    Args:
        app: what to call with a request that is fine.
        config: the bounds.
        resolve: host name -> its addresses, for tests.
        find_media: who asks, and an id -> the kept picture that `epd-media://ID` stands for.
    """

    def __init__(
        self,
        app: App,
        config: EndpointConfig,
        resolve: Resolve | None = None,
        find_media: FindMedia = lambda _scope, _id: None,
    ) -> None:
        self._app, self._config, self._resolve = app, config, resolve or addresses_of
        self._find_media = find_media

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers with the refusal, or runs the application with the body already read."""
        if scope["type"] != "http" or scope["method"] not in _WITH_BODY:
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        try:
            body = await self._read(scope, receive)
            if body is None:
                return
            kept: dict[str, StoredPicture] = {}
            if path == MEDIA_PATH:
                check_upload(body, self._config)
            elif body and _is_json(scope):
                find = functools.partial(self._find_media, scope)
                is_slow = len(body) >= _THREAD_BYTES or any(each in body for each in _SLOW)
                if not is_slow and not self._config.allowed_media_domains:
                    kept = check_json(path, body, self._config, self._resolve, find)
                else:
                    kept = await asyncio.to_thread(check_json, path, body, self._config, self._resolve, find)
        except RefusedError as error:
            await send_failure(send, path, error.failure)
            return
        # What the request refers to is held by it from here on, whenever that expires.
        token = current_media.set(kept)
        try:
            await self._app(scope, _replay(body, receive), send)
        finally:
            current_media.reset(token)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body, or None where the client went away before its end."""
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


def read_json(body: bytes) -> Any:
    """A JSON body; no garbage is collected meanwhile: deep inside of a nested body, finalizers would have no stack.

    Raises:
        msgspec.DecodeError: it is none.
        RecursionError: it is nested too deeply.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return msgspec.json.decode(body)
    finally:
        if collects:
            gc.enable()


def check_json(
    path: str,
    body: bytes,
    config: EndpointConfig,
    resolve: Resolve,
    find: Callable[[str], StoredPicture | None] = lambda _id: None,
) -> dict[str, StoredPicture]:
    """Checks a JSON body and the media in it; blocking where names have to be resolved.

    Returns:
        The kept pictures that it refers to, by their ids.

    Raises:
        RefusedError: with the reason.
    """
    try:
        data = read_json(body)
    except msgspec.DecodeError as error:
        raise RefusedError(ErrorCode.INVALID_JSON, f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise RefusedError(ErrorCode.INVALID_JSON, "the body is nested too deeply") from None
    if not isinstance(data, dict):
        return {}  # vLLM says which fields it expects
    if path.startswith("/inference") and data.get("features"):
        raise RefusedError(ErrorCode.UNSUPPORTED, "ready-made multimodal features are not supported")
    media = [*media_in([data.get("messages"), data.get("input"), data.get("system")])]
    for kind, limit in (("image", config.max_images), ("video", config.max_videos), ("audio", config.max_audios)):
        if sum(each == kind for each, _ in media) > limit:
            raise RefusedError(ErrorCode(f"too_many_{kind}s"), f"more than {limit} {kind}s in one request")
    kept: dict[str, StoredPicture] = {}
    for kind, url in media:
        if kind == "image" and url.startswith(SCHEME):
            media_id = url.removeprefix(SCHEME)
            found = find(media_id)
            if found is None:
                raise media_not_found(media_id)
            kept[media_id] = found
        else:
            check_media(kind, url, config, resolve)
    return kept


def media_not_found(media_id: str) -> RefusedError:
    """The answer for an id that is unknown, has expired or is another's."""
    text = f"no picture {media_id[:64]!r} is kept here; it may have expired: upload it again, or send it"
    return RefusedError(ErrorCode.MEDIA_NOT_FOUND, text)


def media_in(tree: Any) -> Iterator[tuple[str, str]]:
    """The (kind, address) of each picture, video and sound in messages, in any of the three APIs' shapes.

    `kind` is "image", "video" or "audio". `input_audio` and Anthropic's base64 sources come out as data URLs.
    """
    stack = [(tree, 0)]
    while stack:
        node, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise RefusedError(ErrorCode.INVALID_JSON, f"messages are nested deeper than {MAX_DEPTH}")
        if isinstance(node, list):
            stack.extend((each, depth + 1) for each in reversed(node))
        elif isinstance(node, dict):
            yield from _media_of(node)
            stack.extend((each, depth + 1) for each in reversed(node.values()) if isinstance(each, dict | list))


def _media_of(part: dict[str, Any]) -> Iterator[tuple[str, str]]:
    sound = part.get("input_audio")
    if isinstance(sound, dict) and isinstance(sound.get("data"), str) and sound["data"]:
        yield "audio", f"data:audio/{sound.get('format', '')};base64,{sound['data']}"  # as vLLM puts it together
    for key, kind in (("image_url", "image"), ("video_url", "video"), ("audio_url", "audio")):
        value = part.get(key)
        url = value.get("url") if isinstance(value, dict) else value
        if isinstance(url, str):
            yield kind, url
    source = part.get("source")
    if part.get("type") == "image" and isinstance(source, dict):
        if source.get("type") == "base64" and isinstance(source.get("data"), str):
            yield "image", f"data:{source.get('media_type', 'image/png')};base64,{source['data']}"
        elif isinstance(source.get("url"), str):
            yield "image", source["url"]


def check_media(kind: str, url: str, config: EndpointConfig, resolve: Resolve) -> None:
    """Checks one address and, where it carries a file, the file's header.

    Raises:
        RefusedError: with the reason.
    """
    scheme = url.partition(":")[0].strip().lower()
    if scheme == "data":
        if kind == "video" and _media_type(url) == JPEG_FRAMES:
            check_frames(url.partition(",")[2], config)
        else:
            _CHECKS[kind](_decoded(kind, url), config)
    elif scheme in ("http", "https"):
        _check_host(url, config, resolve)
    elif scheme == "file":
        _check_file(kind, url, config)
    else:
        raise RefusedError(ErrorCode.INVALID_URL, f"media must be given as a data URL, not as {scheme[:16]!r}")


def check_upload(content: bytes, config: EndpointConfig) -> None:
    """Checks the body of an upload, which is a picture's file.

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


def addresses_of(host: str) -> list[str]:
    """The addresses that a host name stands for; blocking."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, None, proto=socket.IPPROTO_TCP)]


def _media_type(url: str) -> str:
    return url.partition(",")[0].partition(":")[2].partition(";")[0].lower()


def _decoded(kind: str, url: str) -> bytes:
    header, found, data = url.partition(",")
    if not found or not header.endswith(";base64"):
        raise RefusedError(ErrorCode.INVALID_URL, f"a data URL must be of the form data:{kind}/...;base64,...")
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise RefusedError(ErrorCode(f"invalid_{kind}"), "the data URL is not valid base64") from None
    if not content:
        raise RefusedError(ErrorCode(f"invalid_{kind}"), "the data URL is empty")
    return content


def _check_host(url: str, config: EndpointConfig, resolve: Resolve) -> None:
    try:
        host = (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        host = ""
    if not host or any(c in url for c in "\\\r\n\t "):
        raise RefusedError(ErrorCode.INVALID_URL, "the media URL is malformed")
    if host not in [domain.lower() for domain in config.allowed_media_domains]:
        text = f"media from {host!r} is not allowed here; send a data URL (allowed_media_domains)"
        raise RefusedError(ErrorCode.URL_NOT_ALLOWED, text)
    try:
        found = resolve(host)
    except OSError as error:
        raise RefusedError(ErrorCode.URL_NOT_ALLOWED, f"{host!r} cannot be resolved: {error.strerror}") from None
    if not found or not all(_is_public(address) for address in found):
        raise RefusedError(ErrorCode.URL_NOT_ALLOWED, f"{host!r} is not a public address")


def _is_public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None)
    return ip.is_global and not ip.is_multicast and (mapped is None or mapped.is_global)


def _check_file(kind: str, url: str, config: EndpointConfig) -> None:
    if not config.allowed_local_media_path:
        raise RefusedError(ErrorCode.URL_NOT_ALLOWED, "local files are not allowed here")
    allowed = Path(config.allowed_local_media_path).resolve()
    parts = urlsplit(url)
    path = Path(unquote(parts.netloc + parts.path)).resolve()
    if not path.is_relative_to(allowed):
        raise RefusedError(ErrorCode.URL_NOT_ALLOWED, "the file is outside the allowed folder")
    if not path.is_file():
        raise RefusedError(ErrorCode(f"invalid_{kind}"), "no such file")
    if path.stat().st_size > config.max_body_bytes:
        raise RefusedError(ErrorCode.BODY_TOO_LARGE, f"the file is larger than {config.max_body_bytes} bytes")
    _CHECKS[kind](path.read_bytes(), config)


def _is_json(scope: Scope) -> bool:
    content_type: bytes = next((v for k, v in scope["headers"] if k == b"content-type"), b"application/json")
    essence = content_type.partition(b";")[0].strip().lower()
    return essence == b"application/json" or essence.endswith(b"+json")


def _too_large(size: int, limit: int) -> RefusedError:
    return RefusedError(ErrorCode.BODY_TOO_LARGE, f"the body has {size} bytes or more; at most {limit} are accepted")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read, then whatever comes."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return first.pop() if first else await receive()

    return replay

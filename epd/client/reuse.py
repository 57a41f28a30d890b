"""Pictures that are used again: uploaded once, then referred to.

Lives in the user's process; owns what the client remembers of pictures: digests of their content and the ids of
uploads, the pictures themselves never. Digests are taken in a thread; all else runs on the client's event loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from PIL import Image

from epd.client.errors import APIError, EPDError, Overloaded, TransportError
from epd.client.pictures import Picture, is_local, picture_file
from epd.client.types import Media
from epd.errors import ErrorCode

__all__ = ["Reuse", "is_not_found", "pictures_in"]

V = TypeVar("V")
_KEEP = 1024
_MARGIN_S = 5.0  # an upload that expires sooner is not referred to
_PAUSE_S = 10.0  # after a refusal that may pass

Upload = Callable[[bytes, str], Awaitable[Media]]


class _Lru(OrderedDict[Any, V], Generic[V]):
    """The `_KEEP` entries that were set last."""

    def remember(self, key: Any, value: V) -> None:
        self[key] = value
        self.move_to_end(key)
        while len(self) > _KEEP:
            self.popitem(last=False)


class _Entry:
    """What is known of one picture under one salt."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.media: Media | None = None
        self.is_refused = False


class Reuse:
    """Remembers pictures, and has those uploaded that come a second time."""

    def __init__(self) -> None:
        self._entries: _Lru[_Entry] = _Lru()
        self._files: _Lru[str] = _Lru()
        self._lock = threading.Lock()
        self._paused_until = 0.0

    async def urls(self, pictures: Sequence[Picture], salt: str, upload: Upload) -> dict[int, str]:
        """Where pictures of this call are kept already, by `id(picture)`; the others are to be sent.

        Args:
            pictures: Those of one call.
            salt: The call's ``cache_salt``.
            upload: Uploads a file under a salt.

        Raises:
            PictureError: A picture cannot be read.
        """
        local = [picture for picture in pictures if is_local(picture)]
        if not local:
            return {}
        digests = await asyncio.to_thread(lambda: [self._digest(picture) for picture in local])
        found: dict[int, str] = {}
        new = {digest for digest in digests if (digest, salt) not in self._entries}
        for picture, digest in zip(local, digests, strict=True):
            entry = self._entries.get((digest, salt)) or _Entry()
            self._entries.remember((digest, salt), entry)
            if digest not in new:
                media = await self._media(entry, picture, salt, upload)
                if media is not None:
                    found[id(picture)] = media.url
        return found

    def forget(self, urls: Iterable[str]) -> None:
        """These are not kept any more."""
        gone = set(urls)
        for entry in self._entries.values():
            if entry.media is not None and entry.media.url in gone:
                entry.media = None

    async def _media(self, entry: _Entry, picture: Picture, salt: str, upload: Upload) -> Media | None:
        async with entry.lock:
            if entry.media is not None and entry.media.expires - _MARGIN_S > time.time():
                return entry.media
            entry.media = None
            if entry.is_refused or time.monotonic() < self._paused_until:
                return None
            try:
                entry.media = await upload(await asyncio.to_thread(picture_file, picture), salt)
            except Overloaded as error:
                self._paused_until = time.monotonic() + (error.retry_after_s or _PAUSE_S)
            except APIError as error:
                entry.is_refused = True
                if error.status in (401, 403, 404, 405):  # it takes no uploads at all, or none of ours
                    self._paused_until = float("inf")
            except TransportError:
                self._paused_until = time.monotonic() + _PAUSE_S
            return entry.media

    def _digest(self, picture: Picture) -> str:
        """Names a picture's content. A file that has its size and time of change is not read again."""
        if isinstance(picture, str | Path):
            key = _stat(picture)
            with self._lock:
                known = self._files.get(key)
            if known is None:
                known = _sha(picture_file(picture))
                with self._lock:
                    self._files.remember(key, known)
            return known
        if isinstance(picture, Image.Image):
            palette = picture.palette.palette if picture.palette is not None else b""
            facts = (picture.mode, picture.size, bytes(palette), picture.info.get("transparency"))
            try:
                return _sha(repr(facts).encode(), picture.tobytes())
            except (OSError, ValueError, SyntaxError):  # a broken lazy file; PNG says how
                return _sha(picture_file(picture))
        return _sha(picture_file(picture))


def pictures_in(images: Sequence[Picture], messages: Sequence[Mapping[str, Any]] | None) -> list[Picture]:
    """The pictures of a call, as the caller gave them."""
    found = [] if isinstance(images, str | bytes) else list(images)
    for message in messages or ():
        content = message.get("content")
        for part in content if isinstance(content, list | tuple) else ():
            if isinstance(part, dict) and part.get("type") == "image" and "image" in part:
                found.append(part["image"])
    return found


def is_not_found(error: EPDError) -> bool:
    """Whether the server does not keep a picture any more that it was asked to use."""
    return isinstance(error, APIError) and error.reason is ErrorCode.MEDIA_NOT_FOUND


def _stat(path: str | Path) -> Any:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None, str(path)  # reading it says why
    return str(path), found.st_mtime_ns, found.st_size, found.st_ino


def _sha(*parts: bytes) -> str:
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))
        hasher.update(part)
    return hasher.hexdigest()

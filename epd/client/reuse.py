"""Pictures that are used again: uploaded once, then referred to.

Lives in the user's process; owns what the client remembers of pictures: digests of their content and ids of uploads,
but
neither the pictures nor where they came from: content alone decides whether a picture is one that the server keeps.
Digests are computed in a thread; everything else runs on the client's event loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Sequence

from epd.client.errors import APIError, EPDError, Overloaded, TransportError
from epd.client.pictures import LocalPicture
from epd.client.types import Media
from epd.errors import ErrorCode

__all__ = ["Reuse", "is_not_found"]

_KEEP = 1024
_MARGIN_S = 5.0  # an upload that expires sooner is not referred to
_PAUSE_S = 10.0  # after a temporary refusal

Upload = Callable[[bytes, str], Awaitable[Media]]


class _Entry:
    """What is known about one picture under one salt."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.media: Media | None = None
        self.is_refused = False


class Reuse:
    """Remembers pictures, and uploads those that are used a second time."""

    def __init__(self) -> None:
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()  # the `_KEEP` most recently used
        self._paused_until = 0.0

    async def urls(self, pictures: Sequence[LocalPicture], salt: str, upload: Upload) -> dict[str, str]:
        """URLs of the pictures of this call that the server keeps, by digest; the others must be sent.

        Args:
            pictures: Those of one call, loaded.
            salt: The call's ``cache_salt``.
            upload: Uploads a file under a salt.

        Raises:
            PictureError: A picture cannot be written as PNG.
        """
        if not pictures:
            return {}
        digests = await asyncio.to_thread(lambda: [picture.digest for picture in pictures])
        found: dict[str, str] = {}
        new = {digest for digest in digests if (digest, salt) not in self._entries}
        for picture, digest in zip(pictures, digests, strict=True):
            entry = self._remembered(digest, salt)
            if digest not in new:
                media = await self._media(entry, picture, salt, upload)
                if media is not None:
                    found[digest] = media.url
        return found

    def forget(self, urls: Iterable[str]) -> None:
        """Forget pictures that the server no longer keeps."""
        gone = set(urls)
        for entry in self._entries.values():
            if entry.media is not None and entry.media.url in gone:
                entry.media = None

    def _remembered(self, digest: str, salt: str) -> _Entry:
        entry = self._entries.setdefault((digest, salt), _Entry())
        self._entries.move_to_end((digest, salt))
        while len(self._entries) > _KEEP:
            self._entries.popitem(last=False)
        return entry

    async def _media(self, entry: _Entry, picture: LocalPicture, salt: str, upload: Upload) -> Media | None:
        async with entry.lock:
            if entry.media is not None and entry.media.expires - _MARGIN_S > time.time():
                return entry.media
            entry.media = None
            if entry.is_refused or time.monotonic() < self._paused_until:
                return None
            try:
                entry.media = await upload(await asyncio.to_thread(picture.file), salt)
            except Overloaded as error:
                self._paused_until = time.monotonic() + (error.retry_after_s or _PAUSE_S)
            except APIError as error:
                entry.is_refused = True
                if error.status in (401, 403, 404, 405):  # it accepts no uploads, or none of ours
                    self._paused_until = float("inf")
            except TransportError:
                self._paused_until = time.monotonic() + _PAUSE_S
            return entry.media


def is_not_found(error: EPDError) -> bool:
    """Whether the server no longer keeps a picture that it was asked to use."""
    return isinstance(error, APIError) and error.reason is ErrorCode.MEDIA_NOT_FOUND

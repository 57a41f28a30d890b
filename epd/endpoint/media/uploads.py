"""Pictures that clients uploaded ahead of their questions: what is kept, for whom and for how long.

Lives in the endpoint process, on its event loop; owns the kept pictures and what the broker was told of them. Each is
an UPLOAD of all its patches; the broker has them encoded and holds them until they expire. Even if that fails, a
request may refer to a kept picture: if its patches are not in the cache, their pixels are sent.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import structlog

from epd.config import EndpointConfig
from epd.endpoint.engine.submission import PipelineError, too_large
from epd.endpoint.http.failures import failure_of
from epd.endpoint.media.stored_picture import StoredPicture
from epd.errors import ErrorCode
from epd.messages import DropUpload, Message, Upload, Uploaded
from epd.multimodal.splitter import Split
from epd.process.bounded import Beliefs

log = structlog.get_logger()

ENCODING, READY, FAILED = "encoding", "ready", "failed"
_SWEEP_S = 1.0
_ID_BYTES = 24
# While the pipeline is incomplete it is asked again, at growing intervals between these, in seconds.
_PASSING = frozenset({ErrorCode.NOT_READY, ErrorCode.WORKER_LOST})
_RETRY_S = (1.0, 30.0)

Send = Callable[[Message, Sequence[Any]], bool]


class Media:
    """One uploaded picture.

    Attributes:
        id: its name for clients; whoever knows it and has the same API key may use it.
        upload_id: its name for the broker.
        owner: a digest of the API key it was uploaded with.
        kept: the file and the processed item.
        split: its patches under the salt it was uploaded with.
        expires: in seconds since 1970, for the client; `expires_at` is the same on the store's clock.
        state: "encoding", "ready" or "failed"; `reason` says why.
        sent_whole: whether the broker was given all pixels.
        retry_at: when the broker is asked again after a temporary failure, `retry_s` after the last time.
    """

    def __init__(self, owner: str, kept: StoredPicture, split: Split, ttl_s: float, now: float) -> None:
        self.id, self.upload_id = secrets.token_urlsafe(_ID_BYTES), secrets.token_hex(8)
        self.owner, self.kept, self.split = owner, kept, split
        self.num_bytes = kept.num_bytes
        self.expires_at, self.expires = now + ttl_s, time.time() + ttl_s
        self.state, self.reason = ENCODING, ""
        self.retry_at, self.retry_s = math.inf, 0.0
        self.sent_whole = False

    @property
    def names(self) -> list[str]:
        """The hashes of its patches."""
        return [patch.patch_hash for patch in self.split.patches]

    def describe(self) -> dict[str, Any]:
        """Its JSON for /v1/media."""
        width, height = self.kept.size
        told = {"id": self.id, "width": width, "height": height, "patches": len(self.split.patches)}
        return (
            told
            | {"expires": int(self.expires), "state": self.state}
            | ({"reason": self.reason} if self.reason else {})
        )


class Uploads:
    """All pictures that are kept.

    Args:
        config: the bounds.
        beliefs: told which patches are in the broker's cache.
        send: sends to the broker; false if its outbox is full.
        clock: seconds, for tests.
    """

    def __init__(
        self, config: EndpointConfig, beliefs: Beliefs, send: Send, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._config, self._beliefs, self._send, self._clock = config, beliefs, send, clock
        self._media: dict[str, Media] = {}
        self._by_upload: dict[str, Media] = {}
        self._coming: dict[str, int] = {}
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._media)

    def find(self, media_id: str, owner: str) -> Media | None:
        """The picture, if it belongs to this owner and has not expired; may be called from any thread."""
        media = self._media.get(media_id)
        if media is None or not secrets.compare_digest(media.owner, owner) or media.expires_at <= self._clock():
            return None
        return media

    @contextmanager
    def room(self, owner: str) -> Iterator[None]:
        """Reserves room for another picture of this owner while entered.

        Raises:
            PipelineError: the owner already has as many as allowed; HTTP 429.
        """
        self.sweep()
        count = sum(each.owner == owner for each in self._media.values()) + self._coming.get(owner, 0)
        if count >= self._config.media_max_per_key:
            raise self._full(f"{count} pictures are already kept for this key", owner)
        self._coming[owner] = self._coming.get(owner, 0) + 1
        try:
            yield
        finally:
            self._coming[owner] -= 1
            if not self._coming[owner]:
                del self._coming[owner]

    def add(self, owner: str, kept: StoredPicture, split: Split) -> Media:
        """Keeps a processed picture and has it encoded.

        Raises:
            PipelineError: there is no room; HTTP 429, or 413 if there never will be.
        """
        media = Media(owner, kept, split, self._config.media_ttl_s, self._clock())
        if media.num_bytes > self._config.media_bytes:
            text = f"the picture takes {media.num_bytes} bytes; {self._config.media_bytes} are kept in all"
            raise PipelineError(failure_of(ErrorCode.BODY_TOO_LARGE, text))
        self.sweep()
        if self.num_bytes + media.num_bytes > self._config.media_bytes:
            raise self._full("no more pictures can be kept now", None)
        self._media[media.id] = self._by_upload[media.upload_id] = media
        self.num_bytes += media.num_bytes
        self._upload(media)
        return media

    def drop(self, media: Media) -> None:
        """Removes a picture before it expires."""
        if self._media.get(media.id) is media:
            self._forget(media)
            self._send(DropUpload(upload_id=media.upload_id), ())

    def sweep(self) -> None:
        """Removes what has expired, as the broker does by itself, and retries what may work now."""
        now = self._clock()
        for media in list(self._media.values()):
            if media.expires_at <= now:
                self._forget(media)
            elif media.retry_at <= now:
                self._upload(media)

    async def keep_sweeping(self) -> None:
        """Sweeps until cancelled."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            self.sweep()

    # --- the broker's side

    def on_uploaded(self, message: Uploaded) -> None:
        """The broker says that the patches of an upload can be read, or why they are not kept."""
        media = self._by_upload.get(message.upload_id)
        if media is None:
            return
        if message.code == ErrorCode.PIXELS_NEEDED and not media.sent_whole:
            self._disbelieve(media, all_of_them=True)
            self._upload(media, whole=True)
        elif message.code:
            media.state, media.reason = FAILED, f"{message.code}: {message.message}"
            self._disbelieve(media)
            if message.code in _PASSING:
                media.retry_s = min(max(2 * media.retry_s, _RETRY_S[0]), _RETRY_S[1])
                media.retry_at = self._clock() + media.retry_s
            log.info("an upload was not kept", upload_id=media.upload_id, reason=media.reason)
        else:
            media.state, media.reason, media.retry_s = READY, "", 0.0
            self._beliefs.add(media.names)

    def on_lost(self) -> None:
        """The broker no longer holds anything."""
        for media in self._media.values():
            media.state, media.reason, media.retry_at = ENCODING, "", math.inf

    def send_all(self) -> None:
        """Sends a broker that knows nothing of this endpoint all live uploads."""
        self.sweep()
        for media in self._media.values():
            self._upload(media)

    # --- inside

    def _upload(self, media: Media, whole: bool = False) -> None:
        """Asks for a picture's patches to be encoded; pixels that should not be needed are sent only if `whole`."""
        media.state, media.reason, media.retry_at = ENCODING, "", math.inf
        sent = media.split if whole else media.split.without(self._beliefs)
        media.sent_whole = sent is media.split
        reason = too_large(sent.frames)
        upload = Upload(upload_id=media.upload_id, patches=sent.patches, ttl_s=media.expires_at - self._clock())
        if not reason and not self._send(upload, sent.frames):
            reason = "overloaded: too many messages are waiting for the broker"
        if reason:
            media.state, media.reason = FAILED, reason

    def _forget(self, media: Media) -> None:
        del self._media[media.id], self._by_upload[media.upload_id]
        self.num_bytes -= media.num_bytes
        self._disbelieve(media)

    def _disbelieve(self, media: Media, all_of_them: bool = False) -> None:
        held = (
            set()
            if all_of_them
            else {name for each in self._media.values() if each.state == READY for name in each.names}
        )
        self._beliefs.forget(name for name in media.names if name not in held)

    def _full(self, text: str, owner: str | None) -> PipelineError:
        ends = [each.expires_at for each in self._media.values() if owner in (None, each.owner)]
        wait_s = max(1.0, math.ceil(min(ends) - self._clock())) if ends else 1.0
        return PipelineError(failure_of(ErrorCode.MEDIA_QUOTA, text, wait_s))

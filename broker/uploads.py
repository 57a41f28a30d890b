"""Uploads: pictures encoded before anybody asks about them, and pinned in the cache until they expire. Pure.

Part of the decision core. An upload is a holder of its patches like a request is; together, uploads may pin a fraction
of the cache, so that requests always have room. While encode workers or the cache are away for a moment, an upload
waits for them with its pixels, as a request does.
"""

from __future__ import annotations

from broker.board import Board, Upload
from broker.endings import Endings
from broker.liveness import POOL, Liveness, named
from broker.patches import PixelsNeededError
from broker.registry import Peer
from cache.index import Outcome
from epd import messages as m
from epd.errors import HTTP_STATUS, ErrorCode
from epd.messages import Role

_HOLDER = "upload:"
_NEEDED = [str(Role.ENCODE), POOL]


class Uploads:
    """The uploads that are kept, on the board; those that wait to be pinned are in `_waiting` too."""

    def __init__(self, board: Board, endings: Endings, liveness: Liveness) -> None:
        self._board, self._endings, self._liveness = board, endings, liveness
        self._waiting: dict[str, Upload] = {}

    def accept(self, peer: Peer, upload: m.Upload, frames: list[bytes], now: float) -> None:
        """Takes in an upload for `start`, or says why not."""
        board, at, by_hash = self._board, 0, dict[str, list[bytes]]()
        for patch in upload.patches:
            by_hash[patch.patch_hash] = frames[at : at + patch.num_frames]
            at += patch.num_frames
        patches = {patch.patch_hash: patch for patch in upload.patches}
        one = Upload(upload.upload_id, peer.peer_id, now + upload.ttl_s, patches, by_hash)
        if upload.upload_id in board.uploads:
            self._refuse(one, ErrorCode.DUPLICATE, "an upload with this id is kept already")
        elif gone := self._liveness.gone(_NEEDED, now):
            self._refuse(one, ErrorCode.NOT_READY, f"{named(gone, 'no')} is registered")
        elif board.frames_bytes + one.frames_bytes > board.config.max_frames_bytes:
            self._refuse(one, ErrorCode.OVERLOADED, f"{board.frames_bytes} bytes of media are in flight")
        else:
            board.uploads[one.upload_id] = self._waiting[one.upload_id] = one
            board.frames_bytes += one.frames_bytes

    def start(self) -> None:
        """Pins the patches of the uploads that wait and has the missing ones encoded, if there is who can."""
        if not self._waiting or self._liveness.absent(_NEEDED):
            return
        for one in list(self._waiting.values()):
            if refusal := self._pin(one):
                self._refuse(one, *refusal)
                self._drop(one)
                continue
            self._let_go_of_pixels(one)
            self._board.count("num_uploads")
            if not one.missing:
                self._board.send(one.endpoint, m.Uploaded(upload_id=one.upload_id))

    def _pin(self, one: Upload) -> tuple[ErrorCode, str] | None:
        """Pins an upload's patches and queues the missing ones, or changes nothing and says why not."""
        board = self._board
        info = board.registry.serving(Role.ENCODE)[0].info
        try:
            needs = board.patches.needs(one.patches.values(), info)
            nbytes = sum(need.nbytes for need in needs)
            room = board.config.upload_fraction * board.patches.index.stats().total_bytes
            if sum(other.nbytes for other in board.uploads.values()) + nbytes > room:
                return ErrorCode.OVERLOADED, "uploads hold their share of the cache already"
            acquired = board.patches.acquire(_HOLDER + one.upload_id, one.patches, one.frames, needs)
        except PixelsNeededError as error:
            return ErrorCode.PIXELS_NEEDED, str(error)
        except ValueError as error:
            return ErrorCode.TOO_LARGE, str(error)
        if acquired is None:
            return ErrorCode.OVERLOADED, "every slot of the cache is in use"
        one.nbytes, one.num_pins = nbytes, len(needs)
        one.missing = {item.patch_hash for item in acquired if item.outcome is not Outcome.HIT}
        return None

    def _refuse(self, one: Upload, code: ErrorCode, text: str) -> None:
        refusal = m.Uploaded(upload_id=one.upload_id, code=code, message=text, status=HTTP_STATUS[code])
        self._board.send(one.endpoint, refusal)

    def encoded(self, holder: str, patch_hashes: list[str]) -> bool:
        """Patches that `holder` pins can be read now; False where `holder` is no upload."""
        one = self._board.uploads.get(holder.removeprefix(_HOLDER)) if holder.startswith(_HOLDER) else None
        if one is None:
            return False
        waited = bool(one.missing)
        one.missing.difference_update(patch_hashes)
        if waited and not one.missing:
            self._board.send(one.endpoint, m.Uploaded(upload_id=one.upload_id))
        return True

    def patch_lost(self, holder: str, code: ErrorCode, text: str) -> None:
        """A patch that `holder` pins will not come: an upload ends with that, if it is one."""
        one = self._board.uploads.get(holder.removeprefix(_HOLDER)) if holder.startswith(_HOLDER) else None
        if one is not None:
            self._refuse(one, code, text)
            self._drop(one)

    def drop(self, peer_id: str, upload_id: str) -> None:
        """Its endpoint does not need an upload any more."""
        one = self._board.uploads.get(upload_id)
        if one is not None and one.endpoint == peer_id:
            self._drop(one)

    def endpoint_lost(self, peer_id: str) -> None:
        """Nobody can ask for this endpoint's uploads any more."""
        for one in [one for one in self._board.uploads.values() if one.endpoint == peer_id]:
            self._drop(one)

    def expire(self, now: float) -> None:
        """Lets go of the uploads whose time is over, and refuses those that have waited in vain."""
        for one in [one for one in self._board.uploads.values() if one.expires_at <= now]:
            self._drop(one)
        if self._waiting and (gone := self._liveness.gone(_NEEDED, now)):
            for one in list(self._waiting.values()):
                self._refuse(one, ErrorCode.NOT_READY, f"{named(gone, 'no')} is registered")
                self._drop(one)

    def _drop(self, one: Upload) -> None:
        self._let_go_of_pixels(one)
        del self._board.uploads[one.upload_id]
        self._endings.drop_unwanted(self._board.patches.release(_HOLDER + one.upload_id))

    def _let_go_of_pixels(self, one: Upload) -> None:
        """An upload waits no longer."""
        if self._waiting.pop(one.upload_id, None):
            self._board.frames_bytes -= one.frames_bytes
            one.frames = {}

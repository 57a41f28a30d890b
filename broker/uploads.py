"""Uploads: pictures encoded before anybody asks about them, and pinned in the cache until they expire. Pure.

Part of the decision core. An upload is a holder of its patches like a request is; together, uploads may pin a fraction
of the cache, so that requests always have room.
"""

from __future__ import annotations

from broker.board import Board, Upload
from broker.endings import Endings
from broker.patches import PixelsNeededError
from broker.registry import Peer
from cache.index import Outcome
from epd import messages as m
from epd.errors import HTTP_STATUS, ErrorCode
from epd.messages import Patch, Role

_HOLDER = "upload:"


class Uploads:
    """The uploads that are kept, on the board."""

    def __init__(self, board: Board, endings: Endings) -> None:
        self._board, self._endings = board, endings

    def accept(self, peer: Peer, upload: m.Upload, frames: list[bytes], now: float) -> None:
        """Pins an upload's patches and has the missing ones encoded, or says why not."""
        board, at, by_hash = self._board, 0, dict[str, list[bytes]]()
        for patch in upload.patches:
            by_hash[patch.patch_hash] = frames[at : at + patch.num_frames]
            at += patch.num_frames
        if upload.upload_id in self._board.uploads:
            self._refuse(peer, upload, ErrorCode.DUPLICATE, "an upload with this id is kept already")
            return
        encoders = board.registry.serving(Role.ENCODE)
        if not encoders or not board.patches.index.pools:
            self._refuse(peer, upload, ErrorCode.NOT_READY, "no encode worker or no cache is registered")
            return
        patches: dict[str, Patch] = {patch.patch_hash: patch for patch in upload.patches}
        try:
            needs = board.patches.needs(patches.values(), encoders[0].info)
            nbytes = sum(need.nbytes for need in needs)
            room = board.config.upload_fraction * board.patches.index.stats().total_bytes
            if sum(one.nbytes for one in self._board.uploads.values()) + nbytes > room:
                self._refuse(peer, upload, ErrorCode.OVERLOADED, "uploads hold their share of the cache already")
                return
            acquired = board.patches.acquire(_HOLDER + upload.upload_id, patches, by_hash, needs)
        except PixelsNeededError as error:
            self._refuse(peer, upload, ErrorCode.PIXELS_NEEDED, str(error))
            return
        except ValueError as error:
            self._refuse(peer, upload, ErrorCode.TOO_LARGE, str(error))
            return
        if acquired is None:
            self._refuse(peer, upload, ErrorCode.OVERLOADED, "every slot of the cache is in use")
            return
        missing = {item.patch_hash for item in acquired if item.outcome is not Outcome.HIT}
        one = Upload(upload.upload_id, peer.peer_id, now + upload.ttl_s, nbytes, len(needs), missing)
        self._board.uploads[upload.upload_id] = one
        board.count("num_uploads")
        if not missing:
            board.send(peer.peer_id, m.Uploaded(upload_id=upload.upload_id))

    def _refuse(self, peer: Peer, upload: m.Upload, code: ErrorCode, text: str) -> None:
        refusal = m.Uploaded(upload_id=upload.upload_id, code=code, message=text, status=HTTP_STATUS[code])
        self._board.send(peer.peer_id, refusal)

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
            refusal = m.Uploaded(upload_id=one.upload_id, code=code, message=text, status=HTTP_STATUS[code])
            self._board.send(one.endpoint, refusal)
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
        """Lets go of the uploads whose time is over."""
        for one in [one for one in self._board.uploads.values() if one.expires_at <= now]:
            self._drop(one)

    def _drop(self, one: Upload) -> None:
        del self._board.uploads[one.upload_id]
        self._endings.drop_unwanted(self._board.patches.release(_HOLDER + one.upload_id))

"""Uploads: pictures encoded before anybody asks about them, and pinned in the cache until they expire. Pure.

Part of the decision core. An upload holds its patches as a leg does. All uploads together may pin only a fraction of
the cache, so that requests always have room. While encode workers or the cache are away for a moment, an upload waits
for them with its pixels, as a request does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

from broker.core.counts import Counts
from broker.core.holders import Holder
from broker.core.legs import Legs
from broker.core.liveness import UPLOAD_NEEDS, Liveness, named
from broker.core.outbox import FrameLedger, Outbox
from broker.core.patches import Patches, PixelsNeededError, UnknownModalityError
from broker.core.peers import Peer
from broker.core.timers import Timer, Timers
from cache.index import Outcome
from epd import messages as m
from epd.errors import ErrorCode
from epd.messages import Patch


@dataclasses.dataclass(slots=True, eq=False)
class Upload:
    """A picture that is kept in the cache for its endpoint until `expires_at`; `missing` patches are not encoded yet.

    A holder of slots (`broker.core.holders`). Until it is pinned it keeps its `frames` (pixels by patch), and `nbytes`
    and `num_pins` are 0.
    """

    upload_id: str
    endpoint: Peer
    keeper: Uploads
    expires_at: float
    patches: dict[str, Patch]
    frames: dict[str, Sequence[bytes]]
    frames_bytes: int
    nbytes: int = 0
    num_pins: int = 0
    missing: set[str] = dataclasses.field(default_factory=set)
    timer: Timer | None = None


class Uploads:
    """The uploads that are kept, and those that wait to be pinned; the keeper of both.

    Attributes:
        by_id: all of them.
        num_pins: how many patches they pin in total.

    Args:
        fraction: the share of the cache that all uploads together may pin.
    """

    def __init__(
        self,
        fraction: float,
        outbox: Outbox,
        patches: Patches,
        liveness: Liveness,
        legs: Legs,
        ledger: FrameLedger,
        timers: Timers,
        counts: Counts,
    ) -> None:
        self._fraction, self._outbox, self._patches, self._liveness = fraction, outbox, patches, liveness
        self._legs, self._ledger, self._timers, self._counts = legs, ledger, timers, counts
        self._waiting: dict[str, Upload] = {}
        self._nbytes = 0
        self.by_id: dict[str, Upload] = {}
        self.num_pins = 0

    # ---- in --------------------------------------------------------------------------------------------------------

    def accept(self, peer: Peer, upload: m.Upload, frames: Sequence[bytes], now: float) -> None:
        """UPLOAD: accepts an upload, for `start` to pin, or refuses it with a reason."""
        at, by_hash = 0, dict[str, Sequence[bytes]]()
        for patch in upload.patches:
            by_hash[patch.patch_hash] = frames[at : at + patch.num_frames]
            at += patch.num_frames
        patches = {patch.patch_hash: patch for patch in upload.patches}
        size = sum(len(frame) for each in by_hash.values() for frame in each)
        one = Upload(upload.upload_id, peer, self, now + upload.ttl_s, patches, by_hash, size)
        if upload.upload_id in self.by_id:
            self._refuse(one, ErrorCode.DUPLICATE, "an upload with this id is kept already")
        elif gone := self._liveness.gone(UPLOAD_NEEDS, now):
            self._refuse(one, ErrorCode.NOT_READY, f"{named(gone, 'no')} is registered")
        elif not self._ledger.has_room(size):
            self._refuse(one, ErrorCode.OVERLOADED, f"{self._ledger.held_bytes} bytes of media are in flight")
        else:
            self.by_id[one.upload_id] = self._waiting[one.upload_id] = one
            self._ledger.hold(size)
            one.timer = self._timers.set(one.expires_at, lambda now: self._drop(one))

    def start(self, now: float) -> None:
        """Pins the patches of waiting uploads and queues the missing ones, unless nobody could encode them now."""
        if not self._waiting or self._liveness.are_absent(UPLOAD_NEEDS):
            return
        for one in list(self._waiting.values()):
            if refusal := self._pin(one):
                self._refuse(one, *refusal)
                self._drop(one)
                continue
            self._let_go_of_pixels(one)
            self._counts.num_uploads += 1
            if not one.missing:
                self._outbox.send(one.endpoint.peer_id, m.Uploaded(upload_id=one.upload_id))

    def _pin(self, one: Upload) -> tuple[ErrorCode, str] | None:
        """Pins an upload's patches and queues the missing ones, or changes nothing and says why not."""
        info = self._patches.encode_info
        assert info is not None
        try:
            needs = self._patches.needs(one.patches.values(), info)
            nbytes = sum(need.nbytes for need in needs)
            if self._nbytes + nbytes > self._fraction * self._patches.index.capacity_bytes:
                return ErrorCode.OVERLOADED, "uploads hold their share of the cache already"
            acquired = self._patches.acquire(one, one.patches, one.frames, needs, deadline_at=one.expires_at)
        except PixelsNeededError as error:
            return ErrorCode.PIXELS_NEEDED, str(error)
        except UnknownModalityError as error:
            return ErrorCode.UNSUPPORTED_MODALITY, str(error)
        except ValueError as error:  # an impossible shape
            return ErrorCode.TOO_LARGE, str(error)
        if acquired is None:
            return ErrorCode.OVERLOADED, "every slot of the cache is in use"
        one.nbytes, one.num_pins = nbytes, len(needs)
        self._nbytes += one.nbytes
        self.num_pins += one.num_pins
        one.missing = {item.patch_hash for item in acquired if item.outcome is not Outcome.HIT}
        return None

    def _refuse(self, one: Upload, code: ErrorCode, text: str) -> None:
        refusal = m.Uploaded(upload_id=one.upload_id, code=code, message=text, status=code.status)
        self._outbox.send(one.endpoint.peer_id, refusal)

    # ---- the keeper of uploads -------------------------------------------------------------------------------------

    def patch_given(self, holder: Holder, patch_hash: str, worker: str, now: float) -> None:
        """See `broker.core.holders.Keeper`, as for those below. Uploads have no stories."""

    def patches_there(
        self, holder: Holder, patch_hashes: Sequence[str], worker: str, took_s: float, batch: int, now: float
    ) -> None:
        """Tells the endpoint once all patches can be read."""
        one = cast(Upload, holder)
        waited = bool(one.missing)
        one.missing.difference_update(patch_hashes)
        if waited and not one.missing:
            self._outbox.send(one.endpoint.peer_id, m.Uploaded(upload_id=one.upload_id))

    def patch_lost(
        self, holder: Holder, patch_hash: str, code: ErrorCode, reason: str, now: float, *, again: bool, blame: bool
    ) -> None:
        """Ends the upload."""
        one = cast(Upload, holder)
        if self.by_id.get(one.upload_id) is one:
            self._refuse(one, code, reason)
            self._drop(one)

    # ---- out -------------------------------------------------------------------------------------------------------

    def drop(self, peer: Peer, message: m.DropUpload, frames: Sequence[bytes], now: float) -> None:
        """DROP_UPLOAD: an endpoint no longer needs an upload."""
        one = self.by_id.get(message.upload_id)
        if one is not None and one.endpoint is peer:
            self._drop(one)

    def endpoint_lost(self, peer: Peer) -> None:
        """Nobody can ask for this endpoint's uploads any more."""
        for one in [one for one in self.by_id.values() if one.endpoint is peer]:
            self._drop(one)

    def give_up_waiting(self, now: float) -> None:
        """Refuses the uploads that have waited in vain."""
        gone = self._liveness.gone(UPLOAD_NEEDS, now)
        for one in list(self._waiting.values()) if gone else ():
            self._refuse(one, ErrorCode.NOT_READY, f"{named(gone, 'no')} is registered")
            self._drop(one)

    def _drop(self, one: Upload) -> None:
        self._timers.stop(one.timer)
        self._let_go_of_pixels(one)
        del self.by_id[one.upload_id]
        self._nbytes -= one.nbytes
        self.num_pins -= one.num_pins
        self._legs.drop_unwanted(self._patches.release(one))

    def _let_go_of_pixels(self, one: Upload) -> None:
        """An upload no longer waits, so nobody needs its pixels from here."""
        if self._waiting.pop(one.upload_id, None):
            self._ledger.let_go(one.frames_bytes)
            one.frames, one.frames_bytes = {}, 0

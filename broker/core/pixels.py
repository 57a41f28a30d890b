"""Pixels of patches, kept for a while in case a patch must be encoded again. Pure; lives in the decision core.

A request that repeats a picture need not bring its pixels, and the patch of a stale slot is encoded again without
asking anybody. The frames are the ones that arrived, not copies.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence


class PixelStore:
    """The frames of the latest patches, at most `max_bytes` of them; the least recently used go first."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._frames: OrderedDict[str, Sequence[bytes]] = OrderedDict()
        self.num_bytes = 0

    def put(self, frames: Mapping[str, Sequence[bytes]]) -> None:
        """Keeps the frames of some patches, by hash; patches without frames are skipped."""
        for patch_hash, one in frames.items():
            if one and patch_hash not in self._frames:
                self._frames[patch_hash] = one
                self.num_bytes += _size(one)
        while self.num_bytes > self._max_bytes:
            _, gone = self._frames.popitem(last=False)
            self.num_bytes -= _size(gone)

    def get(self, patch_hash: str, own: Mapping[str, Sequence[bytes]]) -> Sequence[bytes]:
        """The frames of a patch: from `own` (by hash) if they are there, else from the store, else none."""
        if own.get(patch_hash):
            return own[patch_hash]
        if patch_hash in self._frames:
            self._frames.move_to_end(patch_hash)
            return self._frames[patch_hash]
        return ()


def _size(frames: Sequence[bytes]) -> int:
    return sum(map(len, frames))

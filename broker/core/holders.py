"""Whoever holds slots of the cache: a leg or an upload. Pure; a part of the decision core.

To the cache's index, holders are only things that can be told apart. What becomes of a holder's patches is told to its
keeper: `broker.core.progress` for legs, `broker.core.uploads` for uploads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from epd.errors import ErrorCode


class Keeper(Protocol):
    """Whoever acts for holders of one kind."""

    def patch_given(self, holder: Holder, patch_hash: str, worker: str, now: float) -> None:
        """An encode worker (by name) was given a patch that `holder` waits for."""

    def patches_there(
        self, holder: Holder, patch_hashes: Sequence[str], worker: str, took_s: float, batch: int, now: float
    ) -> None:
        """Patches that `holder` holds can be read: an encode worker did them in a batch that took `took_s`."""

    def patch_lost(
        self, holder: Holder, patch_hash: str, code: ErrorCode, reason: str, now: float, *, again: bool, blame: bool
    ) -> None:
        """A patch that `holder` holds will not come; it may be asked for `again` if the patch is not at fault.

        `blame` says that the holder may have killed the worker.
        """


class Holder(Protocol):
    """What pins slots."""

    def __hash__(self) -> int:
        """The index tells holders apart by identity, not by value."""

    @property
    def keeper(self) -> Keeper:
        """Who acts for it."""

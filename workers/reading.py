"""What the stages that read embeddings share: slots that are ready are read, or fetched while the engine goes on.

Lives in a worker's engine thread.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable
from concurrent.futures import Future
from functools import partial

from cache.slot import StaleSlotError
from epd.messages import PatchReady
from workers.stage import Stage


class ReadingStage(Stage):
    """A stage whose requests wait for patches."""

    def _ready(self, request_id: str, ready: Iterable[PatchReady]) -> None:
        """Patches that a request waits for are in their slots."""
        for patch in ready:
            try:
                fetch = self.engine.connector.patch_ready(patch.patch_hash, patch.slot)
            except StaleSlotError as error:
                self._stale(request_id, patch, str(error))
            else:
                if fetch is not None:
                    fetch.add_done_callback(partial(self._call, self._fetched, patch))

    def _fetched(self, patch: PatchReady, fetch: Future[memoryview]) -> None:
        """A patch has come from another host, or has not."""
        try:
            self.engine.connector.patch_fetched(patch.patch_hash, patch.slot, fetch)
        except StaleSlotError as error:
            for request_id in self.engine.connector.readers(patch.patch_hash):
                self._stale(request_id, patch, str(error))

    @abc.abstractmethod
    def _stale(self, request_id: str, patch: PatchReady, reason: str) -> None:
        """The slot of a patch that a request waits for holds anything else."""

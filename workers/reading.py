"""What the stages that read embeddings share: they read slots that are ready, and the engine goes on meanwhile.

Lives in a worker's engine thread.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable
from concurrent.futures import Future
from functools import partial

from cache.slot import StaleSlotError
from epd.messages import PatchReady
from workers.stage import StageRunner, ever_later

_SLOT_POLL_S = (0.0002, 0.005)


class ReadingStage(StageRunner):
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
        """A patch has come from another host, or has failed to."""
        try:
            self.engine.connector.patch_fetched(patch.patch_hash, patch.slot, fetch)
        except StaleSlotError as error:
            for request_id in self.engine.connector.readers(patch.patch_hash):
                self._stale(request_id, patch, str(error))

    def _look_at_slots(self) -> None:
        """Checks whether patches on a device have been written by now."""
        for patch_hash, slot, reason in self.engine.connector.look_at_unwritten():
            patch = PatchReady(patch_hash=patch_hash, slot=slot)
            for request_id in self.engine.connector.readers(patch_hash):
                self._stale(request_id, patch, reason)

    def poll_s(self, num_idle_steps: int) -> float | None:
        """Slots that are not written yet are polled less and less often."""
        return ever_later(_SLOT_POLL_S, num_idle_steps) if self.engine.connector.num_unwritten else None

    @abc.abstractmethod
    def _stale(self, request_id: str, patch: PatchReady, reason: str) -> None:
        """The slot of a patch that a request waits for holds something else."""

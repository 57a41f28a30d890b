"""When a worker has lost so much KV memory that it should be replaced. Pure: time and counts are arguments.

Blocks that no request of the stage holds are usually about to be freed: a peer may still read or write them. They are
free within seconds unless that peer hangs (`workers.push_connector`). A worker that misses many of them for long asks
to be replaced, since nothing in its process can tell when they are safe to use.
"""

from __future__ import annotations

import dataclasses

FRACTION = 0.25
PATIENCE_S = 60.0


@dataclasses.dataclass(slots=True)
class LeakWatch:
    """Watches blocks that are in use but belong to nobody.

    Attributes:
        fraction: the share of all blocks that may be missing.
        patience_s: how long more than that may be missing without a break, in seconds.
    """

    fraction: float = FRACTION
    patience_s: float = PATIENCE_S
    _since: float | None = None

    def observe(self, now: float, *, num_blocks: int, num_in_use: int, num_wanted: int) -> str:
        """Takes one look at the counts.

        Args:
            now: seconds of any monotonic clock.
            num_blocks: blocks that the KV cache has.
            num_in_use: blocks that are not free.
            num_wanted: blocks of requests that the stage knows.

        Returns:
            Why the worker should be replaced, or "" if it should not.
        """
        num_missing = num_in_use - num_wanted
        if num_missing <= self.fraction * num_blocks:
            self._since = None
            return ""
        if self._since is None:
            self._since = now
        if now - self._since < self.patience_s:
            return ""
        return f"{num_missing} of {num_blocks} KV blocks have belonged to nobody for {now - self._since:.0f} s"

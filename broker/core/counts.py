"""What the core counts: everything that only grows. Pure; a part of the decision core."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(slots=True)
class Counts:
    """Counts since the broker started, named as in `epd.messages.Counters`."""

    num_accepted: int = 0
    num_refused: int = 0
    num_finished: int = 0
    num_failed: int = 0
    num_cancelled: int = 0
    num_retried: int = 0
    num_stale: int = 0
    num_fenced: int = 0
    num_uploads: int = 0

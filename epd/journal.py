"""What can happen to a request or a worker, by name, and which of these things begin and end a span.

Lives in every process; pure. The broker's core notes them (`broker.core.journal`); stories, the demo's timeline and
whoever watches the pipeline read them.
"""

from __future__ import annotations

import enum


class Happening(enum.StrEnum):
    """One kind of entry in the journal. Values are what clients of `/v1/requests/{id}` see.

    The last four are of workers, all others of requests.
    """

    ACCEPTED = "accepted"
    STARTED = "started"
    CACHE_HIT = "cache hit"
    COALESCED = "coalesced"
    ENCODE = "encode"
    ENCODED = "encoded"
    STALE = "stale"
    PREFILLED = "prefilled"
    FIRST_TOKEN = "first token"
    PUSHED = "pushed"
    DECODING = "decoding"
    PREEMPTED = "preempted"
    RETRIED = "retried"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"
    JOINED = "joined"
    SERVES = "serves"
    DRAINING = "draining"
    LEFT = "left"


# The event that begins a span -> the one that ends it. A span of a patch is that of the patch with the same hash; a leg
# that is given up leaves its spans open, and RETRIED, FAILED or CANCELLED ends them all.
SPANS: dict[Happening, Happening] = {
    Happening.ACCEPTED: Happening.STARTED,
    Happening.ENCODE: Happening.ENCODED,
    Happening.STARTED: Happening.PREFILLED,
    Happening.PREFILLED: Happening.PUSHED,
    Happening.FIRST_TOKEN: Happening.FINISHED,
}
ENDS = frozenset({Happening.FINISHED, Happening.FAILED, Happening.CANCELLED})

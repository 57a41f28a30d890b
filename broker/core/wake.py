"""Whether it is worth trying to start the request at the head of the queue. Pure; a part of the decision core.

While the head cannot start, every token and heartbeat would otherwise try it again in vain. So whoever frees something
that the head may be waiting for says so here, and nothing else makes the core look at the queue.
"""

from __future__ import annotations

import enum


class Room(enum.StrEnum):
    """What a request may have to wait for."""

    PREFILL = "a prefill worker with room"
    DECODE = "a decode worker with room"
    SLOTS = "slots of the cache"


class Wake:
    """Whether the head is to be tried (`due`), and what it lacked when it was last tried (`lacks`).

    `lacks` is None if the head is not known to lack anything. Only the first thing that it lacks is known: what is
    freed otherwise cannot help it.
    """

    def __init__(self) -> None:
        self.due = False
        self.lacks: Room | None = None

    def freed(self, what: Room) -> None:
        """More of something is free."""
        if self.lacks is what:
            self.due = True

    def slots_freed(self) -> None:
        """As `freed`, of slots."""
        self.freed(Room.SLOTS)

    def arrived(self) -> None:
        """A request has come: it is tried, unless the head is known not to fit."""
        if self.lacks is None:
            self.due = True

    def changed(self) -> None:
        """Workers or pools have come or gone, or another request may be the head."""
        self.due = True

    def tried(self, lacks: Room | None) -> None:
        """The head was tried: it lacks something, or nothing waits."""
        self.due, self.lacks = False, lacks

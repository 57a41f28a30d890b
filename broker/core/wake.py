"""Whether there is any use in trying to start the request at the head of the queue. Pure; a part of the decision core.

Whoever frees what the head may wait for says so; nothing else makes the core look at the queue again.
"""

from __future__ import annotations

import enum


class Room(enum.StrEnum):
    """What a request may have to wait for."""

    PREFILL = "a prefill worker with room"
    DECODE = "a decode worker with room"
    SLOTS = "slots of the cache"


class Wake:
    """Whether the head is to be tried (`due`), and what it lacked when it was tried last (`lacks`).

    That is None where it is not known to lack anything.
    """

    def __init__(self) -> None:
        self.due = False
        self.lacks: Room | None = None

    def freed(self, what: Room) -> None:
        """There is more of something."""
        if self.lacks is what:
            self.due = True

    def slots_freed(self) -> None:
        """As `freed`, of slots."""
        self.freed(Room.SLOTS)

    def arrived(self) -> None:
        """A request has come: it is tried, unless one before it cannot be started."""
        if self.lacks is None:
            self.due = True

    def changed(self) -> None:
        """Workers or pools have come or gone, or what is first has changed."""
        self.due = True

    def tried(self, lacks: Room | None) -> None:
        """The head was tried: it lacks something, or nothing waits."""
        self.due, self.lacks = False, lacks

"""What has happened, told to whoever watches. Pure; a part of the decision core.

Everything that is noted of a request goes through `broker.core.request.Request.tell`, into its story and from there to
here; what happens to workers comes from `broker.core.membership`. An endpoint that watches gets one message a tick at
most, of bounded size: nobody who watches slows the broker, and while nobody does, an entry costs a look at a set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from broker.core.outbox import Outbox
from epd import messages as m
from epd.journal import Happening
from epd.messages import JournalEntry, StoryEvent

if TYPE_CHECKING:
    from broker.core.peers import Peer

MAX_ENTRIES = 2048  # of one JOURNAL


class Journal:
    """The entries of this tick, and who wants them.

    Args:
        epoch_s: the wall clock (seconds since 1970) when the core's clock was 0.
    """

    def __init__(self, outbox: Outbox, epoch_s: float) -> None:
        self._outbox, self._epoch_s = outbox, epoch_s
        self._watchers: dict[str, None] = {}
        self._entries: list[JournalEntry] = []
        self._num_dropped = 0

    def watch(self, peer: Peer, message: m.Watch) -> None:
        """WATCH: an endpoint wants to know what happens, or no longer."""
        if message.on:
            self._watchers[peer.peer_id] = None
        else:
            self.leave(peer)

    def leave(self, peer: Peer) -> None:
        """A peer no longer watches; nothing happens if it did not."""
        self._watchers.pop(peer.peer_id, None)
        if not self._watchers:
            self._entries, self._num_dropped = [], 0

    def told(self, request_id: str, accepted_at: float, event: StoryEvent) -> None:
        """A line was added to a request's story."""
        if not self._watchers:
            return
        entry = JournalEntry(
            at=self._epoch_s + accepted_at + event.at_s,
            event=event.event,
            request_id=request_id,
            worker=event.worker,
            patch=event.patch,
            took_s=event.took_s,
            detail=event.detail,
        )
        self._note(entry)

    def worker(self, now: float, what: Happening, name: str, detail: str = "") -> None:
        """Something has happened to a worker."""
        if self._watchers:
            self._note(JournalEntry(at=self._epoch_s + now, event=what, worker=name, detail=detail))

    def _note(self, entry: JournalEntry) -> None:
        if len(self._entries) < MAX_ENTRIES:
            self._entries.append(entry)
        else:
            self._num_dropped += 1

    def send(self) -> None:
        """A tick is over: all who watch are told what has happened since the last."""
        if not self._entries:
            return
        message = m.Journal(entries=self._entries, num_dropped=self._num_dropped)
        for peer_id in self._watchers:
            self._outbox.send(peer_id, message)
        self._entries, self._num_dropped = [], 0

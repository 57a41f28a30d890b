"""The events of a process that uses pools in GPU memory: those it records as it writes, and those it waits for.

Lives in the workers. Owns a process's events (`EVENTS`) and, for each view that writes, its entry in the header table.
"""

from __future__ import annotations

import threading
from typing import Any

from cache.pools.cuda_ipc_headers import RING_EVENTS, EventId, HeaderTable
from cache.pools.cuda_ipc_runtime import Runtime
from epd.messages import Slot


class Events:
    """The events that this process has made or opened, for all its views: there is one of these, `EVENTS`.

    vLLM makes two connectors in one process, so a view may read what another view wrote, and two may read one slot.
    CUDA cannot open an event in the process that made it, and does not say whether one can be opened twice. All stay
    until the process ends: destroying an event for which another process still waits is undefined.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: dict[EventId, int] = {}
        self._opened: dict[EventId, int] = {}

    def keep(self, made: dict[EventId, int]) -> None:
        """Adds events that this process has made."""
        with self._lock:
            self._made.update(made)

    def find(self, event: EventId, table: HeaderTable, runtime: Runtime, device: int) -> int | None:
        """The event as CUDA knows it here; None if its writer is dead, so that it must not be used.

        Raises:
            RuntimeError: CUDA cannot open it.
        """
        with self._lock:
            if event in self._made:
                return self._made[event]
            if (handle := table.event_handle(event)) is None:
                return None
            if event not in self._opened:
                self._opened[event] = runtime.open_event(device, handle)
            return self._opened[event]


EVENTS = Events()


class Writer:
    """The writing side of a view: its entry in the table, its ring of events, and the copies not known to be done.

    All events belong to one GPU, that of the first tensor: an event can only be recorded on streams of its own GPU.
    """

    def __init__(self, runtime: Runtime, table: HeaderTable, events: Events, device: int) -> None:
        self._runtime = runtime
        self._table = table
        self._events = events
        self._device = device
        self._index = table.claim()
        self._ring = [runtime.create_event(device) for _ in range(RING_EVENTS)]
        self._serial = table.enroll(self._index, [runtime.export_event(event) for event in self._ring])
        events.keep({self._id(number): event for number, event in enumerate(self._ring)})
        self._spans = [(0, 0)] * RING_EVENTS
        self._next = 0
        self._pending: dict[int, tuple[int, int]] = {}  # position -> number in the ring, generation; as written

    def write(self, position: int, slot: Slot, header: bytes, target: Any, source: Any, device: int) -> None:
        """See `CudaIpcView.write`."""
        if device != self._device:
            raise ValueError(f"the tensor is on GPU {device}; this process writes from GPU {self._device}")
        self.settle()
        number, start, end = self._next, slot.offset, slot.offset + slot.nbytes
        self._next = (number + 1) % RING_EVENTS
        self._table.begin(position)
        self._pending.pop(position, None)
        self._wait_for_earlier(start, end)
        first, last = self._spans[number]  # of a copy that may still be running when the event is used again
        self._cover(number, min(first, start) if last else start, max(last, end))
        self._runtime.copy(target, source)
        self._runtime.wait(self._ring[number], device)  # its previous record, perhaps on another stream
        self._runtime.record(self._ring[number], device)
        self._table.publish(position, slot, header, self._id(number))
        self._pending[position] = (number, slot.generation)
        for other, (first, last) in enumerate(self._spans):  # whoever waits for this copy has waited for those
            if other != number and start <= first < last <= end:
                self._cover(other, 0, 0)

    def settle(self) -> int:
        """Marks the copies that are done; returns how many are not.

        A copy whose event was used again counts with the later one.
        """
        while self._pending:
            position, (number, generation) = next(iter(self._pending.items()))
            if not self._runtime.is_done(self._ring[number]):
                break
            self._table.settle(position, generation)
            self._cover(number, 0, 0)
            del self._pending[position]
        return len(self._pending)

    def finish(self) -> None:
        """Waits until all is done, and marks it."""
        if self._pending:
            self._runtime.synchronize(self._device)
            self.settle()

    def _wait_for_earlier(self, start: int, end: int) -> None:
        """Lets the stream wait for the copies into these bytes that may not have run yet, whoever queued them."""
        for earlier in self._table.unfinished(start, end):
            if (event := self._events.find(earlier, self._table, self._runtime, self._device)) is not None:
                self._runtime.wait(event, self._device)

    def _cover(self, number: int, start: int, end: int) -> None:
        self._spans[number] = (start, end)
        self._table.cover(self._index, number, start, end)

    def _id(self, number: int) -> EventId:
        return EventId(self._index, number, self._serial)

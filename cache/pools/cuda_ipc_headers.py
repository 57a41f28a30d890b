"""The headers of a pool in GPU memory: a table in shared memory beside it, so that a check need not ask the GPU.

Lives in the cache daemon, which makes the table, and in the workers, which map it; pure but for the file locks by which
a writer shows that it is alive. Owns no memory: it works on a mapped segment, as `cache.slot` does.

The segment, little endian:

| offset | bytes | what |
|---|---|---|
| 0 | 4096 | control: magic "EPDCUDA" and a zero byte (all zero once the pool is closed), version, sizes |
| 4096 | `MAX_WRITERS` x `_WRITER_BYTES` | writers: serial number, the handles of the events of its ring, their spans |
| `_ENTRIES_AT` | 128 each | headers: one for each `granule` bytes of the pool, at `slot.offset // granule` |

A header is that of `cache.slot`, without a checksum, and in its zero bytes:

| offset | bytes | field |
|---|---|---|
| 88 | 2 | writer: index of its entry |
| 90 | 2 | ring: which of its events stands for the copy into this slot |
| 96 | 8 | serial of the writer, so that an entry with a new writer is not taken for that of the old one |
| 104 | 8 | settled: generation + 1 once the writer has seen that the copy is done; readers need no event then |
| 112 | 8 | offset of the slot |

No slot is smaller than a granule, so no two slots that are in use share a header. A granule is the smallest that
gives at most `MAX_ENTRIES` headers (32 MiB, half of Docker's /dev/shm): 1 KiB for a pool of 256 MiB, 16 KiB for 4 GiB.
The first 128 bytes of a slot on the GPU stay unused: the index counts slots as on CPUs.

The span of an event is the range of bytes in the pool that covers all copies it stands for that may not have run yet; 0
to 0 if there are none. From the spans a writer finds the copies that its own must come after: slots may have been freed
and given to other patches, at other offsets too, while a copy into them was still queued.

Only writers write headers, so "settled" may be written by a writer that is too late and whose slot is another's now: it
then holds an old generation and has no effect.
"""

from __future__ import annotations

import errno
import fcntl
import secrets
import struct
from typing import NamedTuple

import msgspec

from cache.extents import ALIGNMENT
from cache.pools.base import PoolError
from cache.slot import HEADER_BYTES, MAGIC, StaleSlotError, check_header, data_bytes
from epd.messages import Slot, Struct

MAX_WRITERS = 64
RING_EVENTS = 32
MAX_ENTRIES = 1 << 18
EVENT_HANDLE_BYTES = 64

_TABLE_MAGIC = b"EPDCUDA\0"
_TABLE_VERSION = 2
_CONTROL = struct.Struct("<8sHHHHQQ")  # magic, version, writers, ring, zero, granule, bytes of the pool
_WRITERS_AT = 4096
_SERIAL = struct.Struct("<Q")
_HANDLES_AT = 64
_SPAN = struct.Struct("<QQ")  # from, to
_SPANS_AT = _HANDLES_AT + RING_EVENTS * EVENT_HANDLE_BYTES
_WRITER_BYTES = _SPANS_AT + RING_EVENTS * _SPAN.size
_ENTRIES_AT = -(-(_WRITERS_AT + MAX_WRITERS * _WRITER_BYTES) // 4096) * 4096
_EXTRA = struct.Struct("<HHIQQQ")  # writer, ring, zero, serial, settled, offset of the slot
_EXTRA_AT = 88
_SETTLED_AT = 104
_FLOCK = struct.Struct("@hhqqi0q")  # Linux' struct flock with 64-bit offsets: type, whence, start, length, pid


class Location(Struct, frozen=True):
    """What `Pool.name` holds for a pool in GPU memory, as JSON.

    `memory` is the CUDA IPC handle; `device` the PCI bus id of the GPU, which is the same in every process, whatever
    CUDA_VISIBLE_DEVICES says; `headers` the path of the segment with headers and event handles.
    """

    memory: bytes
    device: str
    headers: str
    headers_nbytes: int

    def encode(self) -> str:
        """As text."""
        return msgspec.json.encode(self).decode()


def decode_location(name: str) -> Location:
    """The location in `Pool.name`.

    Raises:
        PoolError: it is not a location.
    """
    try:
        return msgspec.json.decode(name, type=Location)
    except msgspec.MsgspecError as error:
        raise PoolError(f"not the location of a pool in GPU memory: {error}") from None


class EventId(NamedTuple):
    """An event: the entry of the writer that made it, which of its ring it is, and the serial of the writer."""

    writer: int
    ring: int
    serial: int


class Record(NamedTuple):
    """What a header says beyond the slot: whose copy it is, which event stands for it, and whether it is done."""

    owner: str
    event: EventId
    settled: bool


def granule_for(nbytes: int) -> int:
    """The granule of a pool of `nbytes`: the smallest power of two, from `ALIGNMENT`, with at most `MAX_ENTRIES`."""
    granule = ALIGNMENT
    while -(-nbytes // granule) > MAX_ENTRIES:
        granule *= 2
    return granule


def table_bytes(nbytes: int) -> int:
    """The size of the segment for a pool of `nbytes`."""
    return _ENTRIES_AT + -(-nbytes // granule_for(nbytes)) * HEADER_BYTES


class HeaderTable:
    """The segment of a pool of `nbytes` bytes, in `memory`; `fd` is the segment's file, for locks.

    Locks belong to the open file (OFD), so they end with the process, however it dies, and with any forked child that
    shares `fd`: so workers are spawned.

    Raises:
        PoolError: `make` is false and this is not the table of such a pool.
    """

    def __init__(self, memory: memoryview, fd: int, nbytes: int, *, make: bool = False) -> None:
        self._memory = memory
        self._fd = fd
        self._nbytes = nbytes
        self.granule = granule_for(nbytes)
        control = (_TABLE_MAGIC, _TABLE_VERSION, MAX_WRITERS, RING_EVENTS, 0, self.granule, nbytes)
        if memory.nbytes < table_bytes(nbytes):
            raise PoolError(f"a header table of {memory.nbytes} bytes for a pool of {nbytes}")
        if make:
            _CONTROL.pack_into(memory, 0, *control)
        elif (found := _CONTROL.unpack_from(memory)) != control:
            raise PoolError(f"the header table says {found}, not {control}: closed, or of another version of EPD")

    def retire(self) -> None:
        """Closes the pool: from now on every slot is refused."""
        self._memory[: len(_TABLE_MAGIC)] = bytes(len(_TABLE_MAGIC))

    # ---- slots -----------------------------------------------------------------------------------------------------

    def position(self, slot: Slot) -> int:
        """Where the header of `slot` is.

        Raises:
            ValueError: the slot is not in this pool.
        """
        needed = HEADER_BYTES + data_bytes(slot.num_tokens, slot.width, slot.dtype)
        if slot.nbytes < needed:
            raise ValueError(f"{slot.nbytes} bytes for header and data, which need {needed}")
        if slot.offset < 0 or slot.offset % ALIGNMENT or slot.offset + slot.nbytes > self._nbytes:
            raise ValueError(f"bytes {slot.offset}..{slot.offset + slot.nbytes} of a pool of {self._nbytes}")
        if slot.nbytes < self.granule:
            raise ValueError(
                f"a slot of {slot.nbytes} bytes; on a GPU a pool of {self._nbytes} has none under {self.granule}: "
                f"lower cache.pool_bytes"
            )
        return _ENTRIES_AT + slot.offset // self.granule * HEADER_BYTES

    def begin(self, position: int) -> None:
        """Keeps everybody from reading this slot until `publish`."""
        self._memory[position : position + len(MAGIC)] = bytes(len(MAGIC))

    def publish(self, position: int, slot: Slot, header: bytes, event: EventId) -> None:
        """Puts a header (`cache.slot.pack_header`) in its place, the magic last; not settled yet."""
        entry = bytearray(header)
        _EXTRA.pack_into(entry, _EXTRA_AT, event.writer, event.ring, 0, event.serial, 0, slot.offset)
        self._memory[position + len(MAGIC) : position + HEADER_BYTES] = entry[len(MAGIC) :]
        self._memory[position : position + len(MAGIC)] = MAGIC

    def settle(self, position: int, generation: int) -> None:
        """Notes that the copy of `generation` into this slot is done."""
        _SERIAL.pack_into(self._memory, position + _SETTLED_AT, _settled(generation))

    def check(self, slot: Slot) -> Record:
        """What the header of `slot` says.

        Raises:
            StaleSlotError: it is the header of something else, or the pool is closed.
        """
        if bytes(self._memory[: len(_TABLE_MAGIC)]) != _TABLE_MAGIC:
            raise StaleSlotError(f"pool {slot.pool_id} is closed")
        try:
            position = self.position(slot)
        except ValueError as error:
            raise StaleSlotError(str(error)) from None
        raw = bytes(self._memory[position : position + HEADER_BYTES])
        header = check_header(raw, slot)
        writer, ring, _, serial, settled, offset = _EXTRA.unpack_from(raw, _EXTRA_AT)
        if offset != slot.offset:
            raise StaleSlotError(f"the header is that of the slot at {offset}")
        if writer >= MAX_WRITERS or ring >= RING_EVENTS or serial == 0:
            raise StaleSlotError(f"no such event: writer {writer}, event {ring}, serial {serial}")
        return Record(header.owner, EventId(writer, ring, serial), settled == _settled(slot.generation))

    # ---- writers ---------------------------------------------------------------------------------------------------

    def claim(self) -> int:
        """An entry for this process, its own until `fd` is closed; the same one if it has one already.

        Raises:
            PoolError: there are `MAX_WRITERS` already, or this kernel has no such locks.
        """
        for index in range(MAX_WRITERS):
            try:
                fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_WRLCK, index))
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    raise PoolError(f"this kernel cannot lock an open file: {error.strerror}") from None
                continue  # another process has it
            _SERIAL.pack_into(self._memory, _writer_at(index), 0)
            return index
        raise PoolError(f"{MAX_WRITERS} processes write to this pool already")

    def enroll(self, index: int, handles: list[bytes]) -> int:
        """Puts the handles of a writer's events into the entry that it has claimed; returns its serial."""
        if len(handles) != RING_EVENTS or any(len(handle) != EVENT_HANDLE_BYTES for handle in handles):
            raise ValueError(f"{RING_EVENTS} handles of {EVENT_HANDLE_BYTES} bytes are needed")
        at, serial = _writer_at(index), secrets.randbits(63) | 1
        spans = bytes(_WRITER_BYTES - _SPANS_AT)
        self._memory[at + _HANDLES_AT : at + _WRITER_BYTES] = b"".join(handles) + spans
        _SERIAL.pack_into(self._memory, at, serial)
        return serial

    def event_handle(self, event: EventId) -> bytes | None:
        """The handle of an event; None if its writer is dead, so that the event must not be used."""
        at = _writer_at(event.writer)
        start = at + _HANDLES_AT + event.ring * EVENT_HANDLE_BYTES
        handle = bytes(self._memory[start : start + EVENT_HANDLE_BYTES])
        probe = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, event.writer))
        alive = _FLOCK.unpack(probe)[0] != fcntl.F_UNLCK
        # The serial is read last: a new writer clears it before it writes handles.
        return handle if alive and _SERIAL.unpack_from(self._memory, at) == (event.serial,) else None

    def cover(self, writer: int, ring: int, start: int, end: int) -> None:
        """Sets the span of an event of this process's own entry."""
        at = _writer_at(writer) + _SPANS_AT + ring * _SPAN.size
        self._memory[at : at + _SPAN.size] = _SPAN.pack(start, end)  # in one piece, so that nobody reads half of it

    def unfinished(self, start: int, end: int) -> list[EventId]:
        """The events of all writers, dead ones too, whose spans overlap `start` to `end`."""
        found = []
        for writer in range(MAX_WRITERS):
            at = _writer_at(writer)
            (serial,) = _SERIAL.unpack_from(self._memory, at)
            if serial == 0:
                continue
            spans = _SPAN.iter_unpack(self._memory[at + _SPANS_AT : at + _WRITER_BYTES])
            found += [
                EventId(writer, ring, serial)
                for ring, (first, last) in enumerate(spans)
                if first < end and start < last
            ]
        return found


def _settled(generation: int) -> int:
    return (generation + 1) % 2**64


def _writer_at(index: int) -> int:
    return _WRITERS_AT + index * _WRITER_BYTES


def _flock(kind: int, index: int) -> bytes:
    return _FLOCK.pack(kind, 0, _writer_at(index), 1, 0)

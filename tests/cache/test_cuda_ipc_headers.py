"""The header table of pools in GPU memory: its layout, its checks, forged headers, and writers that live and die."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.pools import cuda_ipc_headers as headers
from cache.pools.base import PoolError
from cache.pools.cuda_ipc_headers import MAX_ENTRIES, MAX_WRITERS, RING_EVENTS, EventId, HeaderTable, Location
from cache.pools.shared_memory import DIRECTORY
from cache.slot import StaleSlotError, pack_header, slot_bytes
from epd.messages import Slot

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
HANDLES = [bytes([index]) * headers.EVENT_HANDLE_BYTES for index in range(RING_EVENTS)]

WRITER = """
import os, sys, time, mmap
from cache.pools.cuda_ipc_headers import HeaderTable, RING_EVENTS, EVENT_HANDLE_BYTES
fd = os.open(sys.argv[1], os.O_RDWR)
table = HeaderTable(memoryview(mmap.mmap(fd, 0)), fd, 1 << 20)
index = table.claim()
print(index, table.enroll(index, [bytes([n]) * EVENT_HANDLE_BYTES for n in range(RING_EVENTS)]), flush=True)
time.sleep(600)
"""


def make_slot(offset=0, generation=1, num_tokens=3):
    return Slot(
        pool_id="g",
        offset=offset,
        nbytes=slot_bytes(num_tokens, 40, "float16"),
        generation=generation,
        num_tokens=num_tokens,
        width=40,
        dtype="float16",
    )


@pytest.fixture
def path():
    file = DIRECTORY / f"epd-cuda-headers-{os.getpid()}"
    file.write_bytes(bytes(headers.table_bytes(MIB)))
    yield file
    file.unlink()


@pytest.fixture
def memory():
    return memoryview(bytearray(headers.table_bytes(MIB)))


@pytest.fixture
def table(memory, path):
    fd = os.open(path, os.O_RDWR)
    yield HeaderTable(memory, fd, MIB, make=True)
    os.close(fd)


def publish(table, slot, *, writer=0, serial=9, ring=0):
    position = table.position(slot)
    table.publish(position, slot, pack_header(slot, "w", None), EventId(writer, ring, serial))
    return position


def test_a_location_survives_its_text_and_anything_else_is_refused():
    location = Location(memory=os.urandom(64), device="0000:1b:00.0", headers="/dev/shm/epd-x", headers_nbytes=7)
    assert headers.decode_location(location.encode()) == location
    for name in ("", "{}", "/dev/shm/epd-x", location.encode()[:-1], location.encode()[:-1] + ',"more":1}'):
        with pytest.raises(PoolError, match="not the location"):
            headers.decode_location(name)


@given(st.integers(1, 1 << 40))
def test_the_table_is_bounded_whatever_the_pool(nbytes):
    granule = headers.granule_for(nbytes)
    assert granule >= 256 and granule & (granule - 1) == 0
    assert -(-nbytes // granule) <= MAX_ENTRIES
    assert granule == 256 or -(-nbytes // (granule // 2)) > MAX_ENTRIES


@given(st.integers(1 << 20, 1 << 33), st.integers(0, 1 << 24), st.integers(0, 1 << 16))
def test_slots_that_do_not_overlap_have_headers_of_their_own(nbytes, start, gap):
    granule = headers.granule_for(nbytes)
    first = start * 256
    second = first + granule + gap * 256  # no slot is smaller than a granule
    assert first // granule != second // granule


def test_a_header_says_whose_copy_it_is_and_when_it_is_settled(table):
    position = publish(table, make_slot(512, 7), writer=3, serial=11, ring=5)
    assert table.check(make_slot(512, 7)) == ("w", (3, 5, 11), False)
    table.settle(position, 6)
    assert not table.check(make_slot(512, 7)).settled
    table.settle(position, 7)
    assert table.check(make_slot(512, 7)).settled
    table.begin(position)
    with pytest.raises(StaleSlotError, match="not finished"):
        table.check(make_slot(512, 7))
    publish(table, make_slot(512, 8))
    assert not table.check(make_slot(512, 8)).settled


@pytest.mark.parametrize(
    ("at", "raw", "reason"),
    [
        (0, b"EPDSLOX\0", "no slot header here"),
        (8, b"\x09\0", "slot format 9"),
        (12, b"\x63\0", "dtype code 99"),
        (16, (2).to_bytes(8, "little"), "generation 2 is here"),
        (24, (4).to_bytes(4, "little"), "4 x 40 is here"),
        (32, (1).to_bytes(8, "little"), "1 bytes are here"),
        (88, MAX_WRITERS.to_bytes(2, "little"), "no such event"),
        (90, RING_EVENTS.to_bytes(2, "little"), "no such event"),
        (96, bytes(8), "serial 0"),
        (112, (256).to_bytes(8, "little"), "that of the slot at 256"),
    ],
)
def test_a_forged_header_is_refused(table, memory, at, raw, reason):
    position = publish(table, make_slot())
    memory[position + at : position + at + len(raw)] = raw
    with pytest.raises(StaleSlotError, match=reason):
        table.check(make_slot())


@given(at=st.integers(0, 87), value=st.integers(0, 255))
def test_no_changed_byte_of_a_header_makes_it_another_slots(at, value):
    memory = memoryview(bytearray(headers.table_bytes(MIB)))
    table = HeaderTable(memory, -1, MIB, make=True)
    position = publish(table, make_slot())
    memory[position + at] = value
    for other in (make_slot(generation=2), make_slot(num_tokens=4), make_slot(offset=512)):
        try:
            table.check(other)
        except StaleSlotError:
            continue
        # Only a change to the very field that differs may do that.
        assert at in (*range(16, 28), *range(32, 40))


def test_slots_outside_the_pool_or_smaller_than_a_granule_have_no_header(table):
    for wrong in (
        make_slot(MIB),
        make_slot(-256),
        make_slot(100),
        msgspec.structs.replace(make_slot(), nbytes=256),
        msgspec.structs.replace(make_slot(), nbytes=2 * MIB),
    ):
        with pytest.raises(ValueError):
            table.position(wrong)
    big = 1 << 30
    large = HeaderTable(memoryview(bytearray(headers.table_bytes(big))), -1, big, make=True)
    assert large.granule == 4096
    with pytest.raises(ValueError, match=r"none under 4096: lower cache.pool_bytes"):
        large.position(make_slot())


def test_a_table_of_another_pool_or_that_is_retired_is_not_opened(table, memory):
    HeaderTable(memory, -1, MIB)
    publish(table, make_slot())
    with pytest.raises(PoolError, match="closed, or of another version"):
        HeaderTable(memory, -1, MIB - 256)
    with pytest.raises(PoolError, match="a header table of"):
        HeaderTable(memory, -1, 2 * MIB)
    table.retire()
    with pytest.raises(PoolError, match="closed"):
        HeaderTable(memory, -1, MIB)
    with pytest.raises(StaleSlotError, match="pool g is closed"):
        table.check(make_slot())


def test_the_table_fits_into_half_of_what_docker_gives_shared_memory():
    assert all(headers.table_bytes(1 << exponent) < 34 * MIB for exponent in range(20, 41))


def test_copies_that_may_still_run_are_found_by_the_bytes_that_they_go_to(table):
    assert table.unfinished(0, MIB) == []
    serials = [table.enroll(writer, HANDLES) for writer in (0, 2)]
    table.cover(0, 31, 512, 1024)
    table.cover(2, 0, 1024, 4096)
    first, second = EventId(0, 31, serials[0]), EventId(2, 0, serials[1])
    assert table.unfinished(0, MIB) == table.unfinished(1023, 1025) == [first, second]
    assert table.unfinished(512, 1024) == table.unfinished(0, 513) == [first]
    assert table.unfinished(0, 512) == table.unfinished(4096, MIB) == []
    table.cover(0, 31, 0, 0)
    assert table.unfinished(0, MIB) == [second]
    table.enroll(2, HANDLES)  # a new writer has the entry
    assert table.unfinished(0, MIB) == []


def test_a_writer_lives_as_long_as_its_process_however_that_ends(path):
    import mmap

    fd = os.open(path, os.O_RDWR)
    memory = memoryview(mmap.mmap(fd, 0))
    table = HeaderTable(memory, fd, MIB, make=True)
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        index, serial = (int(word) for word in process.stdout.readline().split())
        publish(table, make_slot(), writer=index, serial=serial, ring=4)
        event = table.check(make_slot()).event
        assert table.event_handle(event) == HANDLES[4]
        assert table.event_handle(event._replace(serial=serial + 1)) is None
        assert table.event_handle(event._replace(writer=index + 1)) is None
        assert table.claim() == index + 1
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        assert table.event_handle(event) is None
        reader = os.open(path, os.O_RDWR)
        other = HeaderTable(memory, reader, MIB)
        assert other.claim() == index  # the dead writer's entry, under a new serial
        assert other.enroll(index, HANDLES) != serial
        assert table.event_handle(event) is None
        os.close(reader)
    finally:
        process.kill()
        process.wait(10)
        if process.stdout is not None:
            process.stdout.close()
        os.close(fd)


def test_a_pool_has_at_most_so_many_writers(path):
    import mmap

    fds = [os.open(path, os.O_RDWR) for _ in range(MAX_WRITERS + 1)]
    memory = memoryview(mmap.mmap(fds[0], 0))
    try:
        tables = [HeaderTable(memory, fd, MIB, make=True) for fd in fds]
        assert [table.claim() for table in tables[:-1]] == list(range(MAX_WRITERS))
        assert tables[5].claim() == 5
        with pytest.raises(PoolError, match="64 processes write"):
            tables[-1].claim()
        with pytest.raises(ValueError, match="32 handles of 64 bytes"):
            tables[0].enroll(0, HANDLES[1:])
    finally:
        for fd in fds:
            os.close(fd)

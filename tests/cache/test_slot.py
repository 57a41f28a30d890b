"""The layout of a slot, and every reason to refuse one."""

import struct
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache import slot as slots
from cache.slot import DTYPES, HEADER_BYTES, StaleSlotError, read, slot_bytes, write
from epd.messages import Slot

OWNER = "0123456789abcdef"


def make(generation=5, offset=256, num_tokens=3, width=10, dtype="bfloat16", **changes):
    nbytes = changes.pop("nbytes", slot_bytes(num_tokens, width, dtype))
    return Slot(
        pool_id="p", offset=offset, nbytes=nbytes, generation=generation, num_tokens=num_tokens, width=width,
        dtype=dtype,
    )  # fmt: skip


def written(slot, checksum=True):
    """A pool with `slot` written in it, and the data."""
    memory = memoryview(bytearray(4096))
    data = bytes(range(slots.data_bytes(slot.num_tokens, slot.width, slot.dtype)))
    write(memory, slot, data, OWNER, checksum)
    return memory, data


def poke(memory, slot, field_offset, value):
    at = slot.offset + field_offset
    memory[at : at + len(value)] = value


@pytest.mark.parametrize(("dtype", "itemsize"), [(name, dtype.itemsize) for name, dtype in DTYPES.items()])
def test_a_slot_holds_its_header_and_its_elements_in_whole_blocks_of_256(dtype, itemsize):
    assert slots.data_bytes(3, 10, dtype) == 30 * itemsize
    assert slot_bytes(1, 128 // itemsize, dtype) == 256
    assert slot_bytes(1, 128 // itemsize + 1, dtype) == 512
    assert slot_bytes(256, 4096, dtype) == 256 * 4096 * itemsize + 256


@pytest.mark.parametrize("shape", [(0, 1, "float16"), (1, -1, "float16"), (2**32, 1, "float16"), (1, 1, "int4")])
def test_impossible_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="embeddings of"):
        slot_bytes(*shape)


def test_dtype_codes_are_part_of_the_format():
    assert {name: dtype.code for name, dtype in DTYPES.items()} == {
        "float32": 1, "float16": 2, "bfloat16": 3,
        "float8_e4m3fn": 4, "float8_e5m2": 5, "float8_e4m3fnuz": 6, "float8_e5m2fnuz": 7,
    }  # fmt: skip


@given(
    st.binary(min_size=1, max_size=600), st.integers(0, 2**64 - 1), st.booleans(), st.booleans(), st.text(max_size=8)
)
def test_what_was_written_is_read(data, generation, checksum, copy, owner):
    slot = make(generation, 512, 1, len(data), "float8_e5m2")
    memory = memoryview(bytearray(b"\xff" * 2048))
    write(memory, slot, data, owner, checksum)
    assert bytes(read(memory, slot, verify=checksum, copy=copy)) == data
    header = slots.check_header(bytes(memory[512 : 512 + HEADER_BYTES]), slot)
    assert (header.owner, header.generation, header.data_bytes) == (owner, generation, len(data))
    assert (header.checksum is None) is not checksum
    assert set(memory[:512]) == {255} and set(memory[512 + slot.nbytes :]) <= {255}, "bytes beside the slot changed"


def test_the_header_is_laid_out_as_documented():
    slot = make(generation=0x1122334455667788)
    memory, data = written(slot)
    raw = bytes(memory[256 : 256 + HEADER_BYTES])
    assert raw[:16] == b"EPDSLOT\0" + struct.pack("<HHHH", 2, 1, 3, 16)
    assert raw[16:40] == struct.pack("<QIIQ", 0x1122334455667788, 3, 10, 60)
    assert raw[40:72] == OWNER.encode().ljust(32, b"\0")
    assert raw[72:88] == slots.checksum(data)
    assert raw[88:] == bytes(40)
    assert bytes(memory[256 + HEADER_BYTES :][:60]) == data


STALE = {
    "nothing was ever written": (lambda m, s: poke(m, s, 0, bytes(HEADER_BYTES)), "nothing was written here"),
    "a writer died half way": (lambda m, s: poke(m, s, 0, bytes(8)), "the writer has not finished"),
    "foreign bytes": (lambda m, s: poke(m, s, 0, b"\x89PNG\r\n\x1a\n"), "no slot header here: magic 89504e470d0a1a0a"),
    "another format": (lambda m, s: poke(m, s, 8, b"\x01"), "slot format 1; this is format 2"),
    "another generation": (lambda m, s: poke(m, s, 16, b"\x06"), "generation 6 is here"),
    "another dtype": (lambda m, s: poke(m, s, 12, b"\x02"), "float16 is here, not bfloat16"),
    "an unknown dtype": (lambda m, s: poke(m, s, 12, b"\x63"), "dtype code 99 is here"),
    "another number of tokens": (lambda m, s: poke(m, s, 24, b"\x04"), "4 x 10 is here, not 3 x 10"),
    "another width": (lambda m, s: poke(m, s, 28, b"\x0b"), "3 x 11 is here, not 3 x 10"),
    "another size": (lambda m, s: poke(m, s, 32, b"\x3d"), "61 bytes are here, not 60"),
    "no checksum": (lambda m, s: poke(m, s, 10, b"\x00"), f"no checksum was written by {OWNER}"),
    "another checksum": (lambda m, s: poke(m, s, 72, b"\x00\x01\x02"), "its checksum differs"),
    "changed data": (lambda m, s: poke(m, s, HEADER_BYTES + 59, b"\xff"), f"not what {OWNER} wrote"),
}


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("case", STALE)
def test_a_slot_with_anything_else_in_it_is_refused_and_says_what(case, copy):
    forge, reason = STALE[case]
    slot = make()
    memory, _ = written(slot)
    read(memory, slot, copy=copy)
    forge(memory, slot)
    with pytest.raises(StaleSlotError, match=reason) as caught:
        read(memory, slot, copy=copy)
    assert reason in caught.value.reason


@given(st.integers(0, HEADER_BYTES + 59), st.integers(1, 255))
def test_no_changed_byte_goes_unnoticed_but_in_the_owners_name_and_the_padding(at, change):
    slot = make()
    memory, data = written(slot)
    memory[slot.offset + at] ^= change
    named = 14 <= at < 16 or 40 <= at < 72 or 88 <= at < 128 or (10 <= at < 12 and not (at == 10 and change & 1))
    if named:
        assert bytes(read(memory, slot)) == data
    else:
        with pytest.raises(StaleSlotError):
            read(memory, slot)


def test_without_verification_only_the_header_counts():
    slot = make()
    memory, data = written(slot, checksum=False)
    assert bytes(read(memory, slot, verify=False)) == data
    poke(memory, slot, HEADER_BYTES, b"\xff")
    assert bytes(read(memory, slot, verify=False)) == b"\xff" + data[1:]


@pytest.mark.parametrize(
    "slot", [make(offset=4096 - 128), make(offset=-256), make(offset=8192), make(nbytes=187)], ids=str
)
def test_a_slot_that_is_not_in_the_pool_is_neither_written_nor_read(slot):
    memory = memoryview(bytearray(4096))
    with pytest.raises(StaleSlotError):
        read(memory, slot)
    with pytest.raises(ValueError):
        write(memory, slot, bytes(60), OWNER)
    assert not any(memory)


def test_data_or_an_owner_that_do_not_fit_change_nothing():
    slot = make()
    memory, data = written(slot)
    with pytest.raises(ValueError, match="61 bytes for 3 x 10 of bfloat16, which is 60"):
        write(memory, slot, bytes(61), OWNER)
    with pytest.raises(ValueError, match="at most 32"):
        write(memory, slot, bytes(60), "x" * 33)
    with pytest.raises(ValueError, match="generation"):
        write(memory, make(generation=2**64), bytes(60), OWNER)
    assert bytes(read(memory, slot)) == data


def test_a_copy_is_the_readers_own_and_a_view_is_the_pools():
    slot = make()
    memory, data = written(slot)
    copy, view = read(memory, slot), read(memory, slot, copy=False)
    poke(memory, slot, HEADER_BYTES, b"\xff")
    assert bytes(copy) == data and view[0] == 0xFF
    copy[0] = 1
    assert view[0] == 0xFF


@pytest.mark.parametrize("checksum", [True, False])
def test_a_writer_that_comes_while_the_slot_is_copied_is_noticed(monkeypatch, checksum):
    slot = make()
    memory, _ = written(slot, checksum)

    def overtaken(data):
        copied = bytearray(data)
        late = memoryview(copied)
        late[30:] = b"\xee" * 30  # the second half was overwritten before it was copied
        write(memory, make(generation=4), b"\xee" * 60, "late", checksum)
        return copied

    monkeypatch.setattr(slots, "bytearray", overtaken, raising=False)
    with pytest.raises(StaleSlotError):
        read(memory, slot, verify=checksum)


def test_the_magic_goes_first_and_comes_back_last():
    class Recorder:
        nbytes = 4096
        stores: ClassVar = []

        def __setitem__(self, where, value):
            self.stores.append((where.start, where.stop, bytes(value)))

    slot = make(offset=0)
    data = bytes(range(60))
    write(Recorder(), slot, data, OWNER)
    first, content, header, last = Recorder.stores
    assert first == (0, 8, bytes(8))
    assert content == (HEADER_BYTES, HEADER_BYTES + 60, data)
    assert header == (8, HEADER_BYTES, slots.pack_header(slot, OWNER, slots.checksum(data))[8:])
    assert last == (0, 8, slots.MAGIC)

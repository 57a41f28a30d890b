"""How a slot lies in memory, how it is written, and every reason for which a reader refuses it.

Lives in the workers and, for sizes only, in the broker; pure: it works on whatever memory it is given and owns none.

A slot is a header of `HEADER_BYTES`, then `num_tokens` x `width` elements of `dtype` in row order, then padding to a
multiple of 256 bytes. The header, little endian:

| offset | bytes | field |
|---|---|---|
| 0 | 8 | magic "EPDSLOT" and a zero byte; all zero while the slot is being written |
| 8 | 2 | format version |
| 10 | 2 | flags: 1 = a checksum was written |
| 12 | 2 | dtype code (`DTYPES`) |
| 14 | 2 | length of the owner's name |
| 16 | 8 | generation |
| 24 | 4 | num_tokens |
| 28 | 4 | width |
| 32 | 8 | bytes of data |
| 40 | 32 | owner: the incarnation of the encode worker that wrote it |
| 72 | 16 | checksum: the first 16 bytes of the data's BLAKE3 |
| 88 | 40 | zero |

The magic is cleared first when a write begins and restored last, so a writer that dies in between leaves a slot that
nobody reads. Checksum and generation together catch a writer that is too late, see `read`.

Checksums are computed at 9 GB/s by one core of the build machine (AVX-512, 2026-11-20; BLAKE2b: 1.3 GB/s):
`python -m timeit -s "from blake3 import blake3; d = bytes(64 << 20)" "blake3(d).digest(16)"` (7.5 ms).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import NamedTuple

from cache.extents import align
from epd.messages import Slot

MAGIC = b"EPDSLOT\0"
FORMAT_VERSION = 2
HEADER_BYTES = 128
MAX_OWNER_BYTES = 32
CHECKSUM_BYTES = 16

_HAS_CHECKSUM = 1
_FIELDS = struct.Struct("<8sHHHHQIIQ32s16s")
_MAX_U32 = 2**32 - 1
_MAX_U64 = 2**64 - 1


class Dtype(NamedTuple):
    """How an element type is written in headers, and its size in bytes."""

    code: int
    itemsize: int


# Named as in torch, without "torch.". Codes are part of the format: never reuse one.
DTYPES: dict[str, Dtype] = {
    "float32": Dtype(1, 4),
    "float16": Dtype(2, 2),
    "bfloat16": Dtype(3, 2),
    "float8_e4m3fn": Dtype(4, 1),
    "float8_e5m2": Dtype(5, 1),
    "float8_e4m3fnuz": Dtype(6, 1),
    "float8_e5m2fnuz": Dtype(7, 1),
}
_DTYPE_NAMES = {dtype.code: name for name, dtype in DTYPES.items()}


class StaleSlotError(Exception):
    """A slot does not hold what the reader expects; `reason` says what is there instead."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Header:
    """A slot's header as found in memory; `checksum` is None if none was written."""

    generation: int
    num_tokens: int
    width: int
    dtype: str
    data_bytes: int
    owner: str
    checksum: bytes | None


def data_bytes(num_tokens: int, width: int, dtype: str) -> int:
    """Bytes of `num_tokens` x `width` elements of `dtype`.

    Raises:
        ValueError: `dtype` is unknown, or a count is not in 1..2^32-1.
    """
    if dtype not in DTYPES:
        raise ValueError(f"embeddings of dtype {dtype!r}; the cache holds {', '.join(DTYPES)}")
    if not (0 < num_tokens <= _MAX_U32 and 0 < width <= _MAX_U32):
        raise ValueError(f"embeddings of {num_tokens} x {width}; both must be in 1..{_MAX_U32}")
    return num_tokens * width * DTYPES[dtype].itemsize


def slot_bytes(num_tokens: int, width: int, dtype: str) -> int:
    """Bytes of a whole slot: header, data and padding; a multiple of 256.

    Raises:
        ValueError: as for `data_bytes`.
    """
    return align(HEADER_BYTES + data_bytes(num_tokens, width, dtype))


def checksum(data: bytes | bytearray | memoryview) -> bytes:
    """The checksum of a slot's data: `CHECKSUM_BYTES` bytes of BLAKE3."""
    from blake3 import blake3  # pools on GPUs have no checksums, and are tested without this package

    return bytes(blake3(data).digest(CHECKSUM_BYTES))


def pack_header(slot: Slot, owner: str, digest: bytes | None) -> bytes:
    """The header of `slot` as bytes.

    Raises:
        ValueError: `owner` has more than `MAX_OWNER_BYTES`, or the slot's numbers do not fit the format.
    """
    name = owner.encode()
    if len(name) > MAX_OWNER_BYTES:
        raise ValueError(f"owner {owner!r} has {len(name)} bytes; at most {MAX_OWNER_BYTES}")
    if not 0 <= slot.generation <= _MAX_U64:
        raise ValueError(f"generation {slot.generation} is not in 0..{_MAX_U64}")
    nbytes = data_bytes(slot.num_tokens, slot.width, slot.dtype)
    flags = 0 if digest is None else _HAS_CHECKSUM
    code = DTYPES[slot.dtype].code
    fields = _FIELDS.pack(
        MAGIC, FORMAT_VERSION, flags, code, len(name), slot.generation, slot.num_tokens, slot.width, nbytes, name,
        digest or b"",
    )  # fmt: skip
    return fields.ljust(HEADER_BYTES, b"\0")


def check_header(raw: bytes, slot: Slot) -> Header:
    """The header in `raw` (`HEADER_BYTES`), which must be that of `slot`.

    Raises:
        StaleSlotError: it is not a header, or that of something else.
    """
    magic, version, flags, code, owner_bytes, generation, num_tokens, width, nbytes, name, digest = _FIELDS.unpack_from(
        raw
    )
    if magic == bytes(len(MAGIC)):
        raise StaleSlotError("nothing was written here, or the writer has not finished")
    if magic != MAGIC:
        raise StaleSlotError(f"no slot header here: magic {magic.hex()}")
    if version != FORMAT_VERSION:
        raise StaleSlotError(f"slot format {version}; this is format {FORMAT_VERSION}")
    if generation != slot.generation:
        raise StaleSlotError(f"generation {generation} is here")
    dtype = _DTYPE_NAMES.get(code, f"dtype code {code}")
    if dtype != slot.dtype:
        raise StaleSlotError(f"{dtype} is here, not {slot.dtype}")
    if (num_tokens, width) != (slot.num_tokens, slot.width):
        raise StaleSlotError(f"{num_tokens} x {width} is here, not {slot.num_tokens} x {slot.width}")
    if nbytes != (expected := data_bytes(slot.num_tokens, slot.width, slot.dtype)):
        raise StaleSlotError(f"{nbytes} bytes are here, not {expected}")
    owner = name[: min(owner_bytes, MAX_OWNER_BYTES)].decode(errors="replace")
    if slot.owner and owner != slot.owner:
        raise StaleSlotError(f"{owner!r} wrote this, not {slot.owner!r}")
    return Header(generation, num_tokens, width, dtype, nbytes, owner, digest if flags & _HAS_CHECKSUM else None)


def write(
    memory: memoryview, slot: Slot, data: bytes | bytearray | memoryview, owner: str, checksum_too: bool = True
) -> None:
    """Writes `data` into `slot` of a pool's `memory`; the slot cannot be read before this returns.

    Args:
        memory: the whole pool, writable, bytes.
        slot: where; its shape is what `data` must have.
        data: the elements in row order, contiguous. The checksum is taken from here, not from the pool.
        owner: the incarnation of the encode worker.
        checksum_too: whether to write a checksum.

    Raises:
        ValueError: the slot is outside the pool, or `data` or `owner` does not fit it; then nothing has changed.
    """
    source = memoryview(data).cast("B")
    expected = data_bytes(slot.num_tokens, slot.width, slot.dtype)
    if source.nbytes != expected:
        raise ValueError(
            f"{source.nbytes} bytes for {slot.num_tokens} x {slot.width} of {slot.dtype}, which is {expected}"
        )
    if (outside := _outside(memory, slot)) is not None:
        raise ValueError(outside)
    header = pack_header(slot, owner, checksum(source) if checksum_too else None)
    start = slot.offset
    memory[start : start + len(MAGIC)] = bytes(len(MAGIC))
    memory[start + HEADER_BYTES : start + HEADER_BYTES + expected] = source
    memory[start + len(MAGIC) : start + HEADER_BYTES] = header[len(MAGIC) :]
    memory[start : start + len(MAGIC)] = MAGIC


def read(memory: memoryview, slot: Slot, verify: bool = True, copy: bool = True) -> memoryview:
    """The data of `slot` as bytes, checked to be that of its generation.

    With `copy` the data is copied first and the copy is checked, so that a late writer cannot slip in between: the
    result is right whatever happens in the pool meanwhile. Without it the view shows the pool itself, and is right as
    long as nobody writes there; the index guarantees that for slots that are pinned and were not renewed.

    Args:
        memory: the whole pool, bytes.
        slot: what is expected, and where.
        verify: check the checksum; a slot without one is then refused.
        copy: return a writable copy instead of a view of the pool.

    Raises:
        StaleSlotError: the slot holds something else.
    """
    if (outside := _outside(memory, slot)) is not None:
        raise StaleSlotError(outside)
    start = slot.offset + HEADER_BYTES
    header = check_header(bytes(memory[slot.offset : start]), slot)
    data = memory[start : start + header.data_bytes]
    if copy:
        data = memoryview(bytearray(data))
    if verify:
        if header.checksum is None:
            raise StaleSlotError(f"no checksum was written by {header.owner}")
        if checksum(data) != header.checksum:
            raise StaleSlotError(f"the data is not what {header.owner} wrote: its checksum differs")
    elif copy:
        # Without a checksum, a writer that interfered while copying shows in the header, which it invalidates first.
        check_header(bytes(memory[slot.offset : start]), slot)
    return data


def copy_out(memory: memoryview, slot: Slot) -> bytes:
    """A slot as it is in memory, header and data, for a reader elsewhere that verifies it.

    Raises:
        StaleSlotError: it holds something else, as far as its header says.
    """
    if (outside := _outside(memory, slot)) is not None:
        raise StaleSlotError(outside)
    start = slot.offset
    header = check_header(bytes(memory[start : start + HEADER_BYTES]), slot)
    image = bytes(memory[start : start + HEADER_BYTES + header.data_bytes])
    # A writer that interfered shows in the header, which it invalidates first.
    check_header(bytes(memory[start : start + HEADER_BYTES]), slot)
    return image


def _outside(memory: memoryview, slot: Slot) -> str | None:
    needed = HEADER_BYTES + data_bytes(slot.num_tokens, slot.width, slot.dtype)
    if slot.nbytes < needed:
        return f"{slot.nbytes} bytes for header and data, but they need {needed}"
    if slot.offset < 0 or slot.offset + slot.nbytes > memory.nbytes:
        return f"bytes {slot.offset}..{slot.offset + slot.nbytes} of a pool of {memory.nbytes}"
    return None

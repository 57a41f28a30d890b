"""Extents of one pool: which of its bytes are in use; best fit, and free neighbours are always joined.

Lives in the broker's decision core; pure. Owns no memory, only the bookkeeping of it.

These hold, and are tested (`tests/cache/test_extents.py`):

- Extents in use never overlap, and every offset is a multiple of `ALIGNMENT`.
- When everything has been freed, in whatever order, there is one free extent. So whatever fits into a new pool fits
  again, in any order.
- While all extents have one size, a request fails only when `capacity // size` of them are in use, whatever has been
  allocated and freed before: an allocation takes the low end of a free extent, so all offsets stay multiples of the
  size.

This does not hold: with several sizes, freeing some extents and asking for the same sizes in another order may fail (4
takes a hole of 6 that two of 3 left). The index then evicts more, or the request waits.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator

ALIGNMENT = 256


def align(nbytes: int) -> int:
    """`nbytes` rounded up to a multiple of `ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Extents:
    """The extents of a pool of `nbytes` bytes; a remainder smaller than `ALIGNMENT` at its end is never used.

    Raises:
        ValueError: `nbytes` is negative.
    """

    def __init__(self, nbytes: int) -> None:
        if nbytes < 0:
            raise ValueError(f"a pool of {nbytes} bytes")
        self.capacity_bytes = nbytes // ALIGNMENT * ALIGNMENT
        self.free_bytes = 0
        self._used: dict[int, int] = {}  # offset -> bytes
        self._free: dict[int, int] = {}  # offset -> bytes
        self._free_offsets: list[int] = []  # sorted, to find neighbours
        self._free_sizes: list[tuple[int, int]] = []  # sorted (bytes, offset), to find the best fit
        if self.capacity_bytes:
            self._add_free(0, self.capacity_bytes)

    @property
    def used_bytes(self) -> int:
        """Bytes in use, rounding included."""
        return self.capacity_bytes - self.free_bytes

    def used(self) -> Iterator[tuple[int, int]]:
        """The (offset, bytes) of each extent in use."""
        return iter(self._used.items())

    def free_extents(self) -> list[tuple[int, int]]:
        """The (offset, bytes) of each free extent, by offset; no two of them touch."""
        return [(offset, self._free[offset]) for offset in self._free_offsets]

    def allocate(self, nbytes: int) -> int | None:
        """The offset of `nbytes` (rounded up) taken from the smallest free extent they fit in, or None.

        Raises:
            ValueError: `nbytes` is not positive.
        """
        need = _checked(nbytes)
        at = bisect.bisect_left(self._free_sizes, (need, 0))
        if at == len(self._free_sizes):
            return None
        _, offset = self._free_sizes[at]
        self._take(offset, offset, need)
        return offset

    def take(self, offset: int, nbytes: int) -> bool:
        """Takes exactly these bytes; False, with nothing changed, if they are not all free.

        Raises:
            ValueError: `nbytes` is not positive, or `offset` is not aligned.
        """
        need = _checked(nbytes)
        if offset % ALIGNMENT:
            raise ValueError(f"offset {offset} is not a multiple of {ALIGNMENT}")
        at = bisect.bisect_right(self._free_offsets, offset) - 1
        if at < 0:
            return False
        start = self._free_offsets[at]
        if offset + need > start + self._free[start]:
            return False
        self._take(start, offset, need)
        return True

    def free(self, offset: int) -> None:
        """Frees the extent at `offset` and joins it with free neighbours.

        Raises:
            ValueError: no extent in use starts there.
        """
        nbytes = self._used.pop(offset, None)
        if nbytes is None:
            raise ValueError(f"no extent in use at {offset}")
        start, end = offset, offset + nbytes
        at = bisect.bisect_left(self._free_offsets, offset)
        after = self._free_offsets[at] if at < len(self._free_offsets) else None
        before = self._free_offsets[at - 1] if at else None
        if after == end:
            end += self._remove_free(after)
        if before is not None and before + self._free[before] == offset:
            start = before
            self._remove_free(before)
        self._add_free(start, end - start)

    def _take(self, start: int, offset: int, nbytes: int) -> None:
        end = start + self._remove_free(start)
        if offset > start:
            self._add_free(start, offset - start)
        if end > offset + nbytes:
            self._add_free(offset + nbytes, end - offset - nbytes)
        self._used[offset] = nbytes

    def _add_free(self, offset: int, nbytes: int) -> None:
        self._free[offset] = nbytes
        self.free_bytes += nbytes
        bisect.insort(self._free_offsets, offset)
        bisect.insort(self._free_sizes, (nbytes, offset))

    def _remove_free(self, offset: int) -> int:
        nbytes = self._free.pop(offset)
        self.free_bytes -= nbytes
        del self._free_offsets[bisect.bisect_left(self._free_offsets, offset)]
        del self._free_sizes[bisect.bisect_left(self._free_sizes, (nbytes, offset))]
        return nbytes


def _checked(nbytes: int) -> int:
    if nbytes <= 0:
        raise ValueError(f"an extent of {nbytes} bytes")
    return align(nbytes)

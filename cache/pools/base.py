"""What a pool is to its owner and to those who use it; one module beside this one for each kind of memory.

Lives in the cache daemon (owners) and in the workers (views); pure.
"""

from __future__ import annotations

import re
from typing import Any, Protocol

from epd.messages import Pool, Slot

MAX_POOL_ID_CHARS = 64


class PoolError(RuntimeError):
    """A pool cannot be made or opened; the text says why and what to do."""


class PoolKindError(PoolError):
    """There is no such kind of pool here; the text names those that there are."""


class PoolOwner(Protocol):
    """A pool in the process that owns its memory."""

    def descriptor(self) -> Pool:
        """What others open it by."""
        ...

    def close(self) -> None:
        """Gives the memory back; views that are open keep working. Closing twice is fine."""
        ...


class PoolView(Protocol):
    """A pool in a process that reads or writes slots of it."""

    @property
    def pool(self) -> Pool:
        """The pool it shows."""
        ...

    def write(self, slot: Slot, data: Any, owner: str) -> None:
        """Writes a slot, with a checksum where the pool has them; see `cache.slot.write`.

        `data` is bytes for pools in host memory and a tensor for those on a device.

        Raises:
            ValueError: `data` or `owner` do not fit the slot, or the slot not the pool.
        """
        ...

    def read(self, slot: Slot) -> Any:
        """A slot's data, verified where the pool has checksums; see `cache.slot.read`.

        A copy as bytes from pools in host memory, a tensor that shows the pool from those on a device.

        Raises:
            StaleSlotError: the slot holds anything else.
        """
        ...

    def settle(self) -> int:
        """Notes which of this process's writes have been done, and tells how many have not; 0 where all are at once."""
        ...

    def close(self) -> None:
        """Closes the view. Closing twice is fine."""
        ...


class DevicePoolView(PoolView, Protocol):
    """A view of a pool on a device, where a slot is written some time after its writer has said so."""

    def check(self, slot: Slot) -> bool:
        """Whether a slot is written, so that from now on `read` waits for nothing; asked without waiting.

        Raises:
            StaleSlotError: the slot holds anything else, or may never be written since its writer is dead.
        """
        ...


def check_pool_id(pool_id: str) -> None:
    """Refuses what cannot be part of a file's name.

    Raises:
        PoolError: it is empty, too long, or has other characters than letters, digits, "-" and "_".
    """
    if not re.fullmatch(f"[A-Za-z0-9_-]{{1,{MAX_POOL_ID_CHARS}}}", pool_id):
        raise PoolError(f"pool id {pool_id!r}: 1 to {MAX_POOL_ID_CHARS} letters, digits, '-' and '_' are allowed")

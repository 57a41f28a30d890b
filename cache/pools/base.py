"""What a pool is to its owner and to its users; each kind of memory has a module beside this one.

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
    """This kind of pool does not exist here; the text names those that do."""


class PoolOwner(Protocol):
    """A pool in the process that owns its memory."""

    def descriptor(self) -> Pool:
        """What others need to open it."""
        ...

    def close(self) -> None:
        """Gives the memory back; open views keep working. Closing twice is fine."""
        ...


class PoolView(Protocol):
    """A pool in a process that reads or writes its slots."""

    @property
    def pool(self) -> Pool:
        """The pool it shows."""
        ...

    def write(self, slot: Slot, data: Any, owner: str) -> None:
        """Writes a slot, with a checksum if the pool has them; see `cache.slot.write`.

        `data` is bytes for pools in host memory and a tensor for those on a device.

        Raises:
            ValueError: `data` or `owner` does not fit the slot, or the slot does not fit the pool.
        """
        ...

    def read(self, slot: Slot) -> Any:
        """A slot's data, verified if the pool has checksums; see `cache.slot.read`.

        From pools in host memory a copy as bytes, from those on a device a tensor that shows the pool.

        Raises:
            StaleSlotError: the slot holds anything else.
        """
        ...

    def settle(self) -> int:
        """Notes which of this process's writes are complete; returns how many are not (0 if writes are immediate)."""
        ...

    def close(self) -> None:
        """Closes the view. Closing twice is fine."""
        ...


class DevicePoolView(PoolView, Protocol):
    """A view of a pool on a device, where a slot may be written only some time after its writer has said so."""

    def check(self, slot: Slot) -> bool:
        """Whether a slot has been written, so that `read` will not have to wait; does not wait itself.

        Raises:
            StaleSlotError: the slot holds something else, or may never be written since its writer is dead.
        """
        ...


def check_pool_id(pool_id: str) -> None:
    """Refuses ids that cannot be part of a file name.

    Raises:
        PoolError: it is empty, too long, or has other characters than letters, digits, "-" and "_".
    """
    if not re.fullmatch(f"[A-Za-z0-9_-]{{1,{MAX_POOL_ID_CHARS}}}", pool_id):
        raise PoolError(f"pool id {pool_id!r}: 1 to {MAX_POOL_ID_CHARS} letters, digits, '-' and '_' are allowed")

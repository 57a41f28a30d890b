"""Pools in shared memory: a file in /dev/shm that the cache daemon owns and the workers of its host map.

Lives in the cache daemon (`SharedMemoryPool`, `sweep_stale`) and in the workers (`SharedMemoryView`). The owner holds a
lock on the file for life, which the kernel drops however it dies; so a segment without a lock has no owner, and the
next daemon to start removes it. `multiprocessing.shared_memory` is not used: its resource tracker unlinks a segment
when any process that opened it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import stat
from pathlib import Path

from cache import slot as slots
from cache.pools.base import PoolError, check_pool_id
from epd.messages import Pool, Slot
from epd.process.hosts import this_host

KIND = "shared_memory"
DIRECTORY = Path("/dev/shm")
PREFIX = "epd-"


class SharedMemoryPool:
    """Owns a segment of `nbytes` bytes; all its memory is allocated once this returns.

    Raises:
        PoolError: there is not enough room, or the segment cannot be made.
    """

    def __init__(self, pool_id: str, nbytes: int, checksum: bool = True, *, directory: Path = DIRECTORY) -> None:
        check_pool_id(pool_id)
        if nbytes <= 0:
            raise PoolError(f"a pool of {nbytes} bytes")
        self._path = directory / (PREFIX + pool_id)
        self._descriptor = Pool(
            pool_id=pool_id,
            kind=KIND,
            name=str(self._path),
            nbytes=nbytes,
            host=this_host(),
            checksum=checksum,
        )
        self._fd: int | None = _create_locked(self._path)
        try:
            # Pages are allocated now: on a full file system, a sparse file would kill whoever touches it first
            # (SIGBUS).
            os.posix_fallocate(self._fd, 0, nbytes)
        except OSError as error:
            self.close()
            raise PoolError(
                f"no room for a pool of {nbytes} bytes in {directory}, which has {_free_bytes(directory)} free "
                f"({error.strerror}): lower cache.pool_bytes, or make more room "
                f"(docker run --shm-size, mount -o remount,size=... {directory})"
            ) from None

    def descriptor(self) -> Pool:
        """What others need to open it; `name` is the path of the segment."""
        return self._descriptor

    def close(self) -> None:
        """Unlinks the segment; its memory is freed with the last view."""
        if self._fd is None:
            return
        self._path.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = None


class SharedMemoryView:
    """Maps a segment that another process owns, to read and write.

    Raises:
        PoolError: it does not exist, belongs to another user, or has another size.
    """

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        try:
            fd = os.open(pool.name, os.O_RDWR | os.O_NOFOLLOW)
        except OSError as error:
            raise PoolError(
                f"pool {pool.pool_id}: {pool.name} of host {pool.host} cannot be opened on {this_host()}: "
                f"{error.strerror}"
            ) from None
        try:
            if (nbytes := os.fstat(fd).st_size) != pool.nbytes:
                raise PoolError(f"pool {pool.pool_id}: {pool.name} has {nbytes} bytes, not {pool.nbytes}")
            self._map = mmap.mmap(fd, pool.nbytes)
        finally:
            os.close(fd)
        self.memory = memoryview(self._map)

    @property
    def pool(self) -> Pool:
        """The pool it shows."""
        return self._pool

    def write(self, slot: Slot, data: bytes | bytearray | memoryview, owner: str) -> None:
        """Writes a slot; see `cache.slot.write`.

        Raises:
            ValueError: `data` or `owner` does not fit the slot, or the slot does not fit the pool.
        """
        slots.write(self.memory, slot, data, owner, self._pool.checksum)

    def read(self, slot: Slot, *, copy: bool = True) -> memoryview:
        """A slot's data; see `cache.slot.read`.

        Raises:
            StaleSlotError: the slot holds something else.
        """
        return slots.read(self.memory, slot, self._pool.checksum, copy)

    def settle(self) -> int:
        """Nothing to note: a write is done when it returns."""
        return 0

    def close(self) -> None:
        """Unmaps the segment; slots that were read without a copy and are still in use delay that."""
        self.memory.release()
        with contextlib.suppress(BufferError):
            self._map.close()


def sweep_stale(directory: Path = DIRECTORY) -> list[str]:
    """Removes this user's segments whose owner is dead; returns their names."""
    removed = []
    for path in sorted(directory.glob(PREFIX + "*")):
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            continue  # another user's, or gone by now
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                continue
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_nlink:
                path.unlink()
                removed.append(path.name)
        except OSError:
            continue  # its owner is alive
        finally:
            os.close(fd)
    return removed


def _create_locked(path: Path) -> int:
    """Makes the file and locks it. If a sweep removes it in between, it is made again."""
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise PoolError(f"{path} cannot be made: {error.strerror}") from None
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:
            return fd
        os.close(fd)


def _free_bytes(directory: Path) -> int:
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize

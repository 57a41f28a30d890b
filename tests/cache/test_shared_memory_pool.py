"""The shared-memory pool, with real processes."""

import fcntl
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from cache import pools
from cache.pools.shared_memory import DIRECTORY, SharedMemoryPool, SharedMemoryView, sweep_stale
from cache.slot import HEADER_BYTES, StaleSlotError, slot_bytes
from epd.messages import Pool, Slot

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20

WRITER = """
import sys, msgspec
from cache import pools
from epd.messages import Pool, Slot
pool, slot = msgspec.json.decode(sys.argv[1], type=Pool), msgspec.json.decode(sys.argv[2], type=Slot)
view = pools.open_view(pool)
view.write(slot, bytes(range(240)), "writer")
view.close()
"""

OWNER = """
import sys, msgspec, time
from pathlib import Path
from cache.pools.shared_memory import SharedMemoryPool
pool = SharedMemoryPool(sys.argv[1], 1 << 20, directory=Path(sys.argv[2]))
print(msgspec.json.encode(pool.descriptor()).decode(), flush=True)
time.sleep(600)
"""


def make_slot(pool_id, offset=0, generation=1):
    nbytes = slot_bytes(3, 40, "float16")
    return Slot(
        pool_id=pool_id, offset=offset, nbytes=nbytes, generation=generation, num_tokens=3, width=40, dtype="float16"
    )


def run(code, *arguments):
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr


@pytest.fixture
def pool(shm):
    owner = SharedMemoryPool("a1", MIB, directory=shm)
    yield owner
    owner.close()


@pytest.fixture
def view(pool):
    opened = pools.open_view(pool.descriptor())
    yield opened
    opened.close()


@pytest.fixture
def dying_owner(shm):
    """A process that owns a pool, and its descriptor."""
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, "b2", str(shm)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    yield process, msgspec.json.decode(process.stdout.readline(), type=Pool)
    process.kill()
    process.wait()
    process.stdout.close()


def test_one_process_writes_and_another_reads(pool, view):
    slot = make_slot("a1", 4096)
    with pytest.raises(StaleSlotError, match="nothing was written here"):
        view.read(slot)
    run(WRITER, msgspec.json.encode(pool.descriptor()).decode(), msgspec.json.encode(slot).decode())
    assert bytes(view.read(slot)) == bytes(view.read(slot, copy=False)) == bytes(range(240))
    with pytest.raises(StaleSlotError, match="generation 1 is here"):
        view.read(make_slot("a1", 4096, generation=2))


def test_data_changed_by_another_process_is_refused(pool, view):
    slot = make_slot("a1")
    run(WRITER, msgspec.json.encode(pool.descriptor()).decode(), msgspec.json.encode(slot).decode())
    with open(pool.descriptor().name, "r+b") as file:
        file.seek(HEADER_BYTES + 100)
        file.write(b"\0")
    with pytest.raises(StaleSlotError, match="not what writer wrote"):
        view.read(slot)


def test_without_checksums_the_header_alone_is_checked(shm):
    owner = SharedMemoryPool("a1", MIB, checksum=False, directory=shm)
    view = pools.open_view(owner.descriptor())
    view.write(make_slot("a1"), bytes(240), "me")
    assert bytes(view.read(make_slot("a1"))) == bytes(240)
    with pytest.raises(StaleSlotError):
        view.read(make_slot("a1", generation=2))
    view.close()
    owner.close()


def test_a_pool_says_what_it_is_and_has_all_its_memory_at_once(pool, shm):
    path = shm / "epd-a1"
    assert pool.descriptor() == Pool(
        pool_id="a1", kind="shared_memory", name=str(path), nbytes=MIB, host=socket.gethostname(), checksum=True
    )
    status = path.stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_size == MIB and status.st_blocks * 512 >= MIB


def test_a_closed_pool_is_gone_but_its_views_keep_working(pool, view, shm):
    view.write(make_slot("a1"), bytes(240), "me")
    pool.close()
    pool.close()
    assert list(shm.iterdir()) == []
    assert bytes(view.read(make_slot("a1"))) == bytes(240)
    with pytest.raises(pools.PoolError, match="No such file"):
        pools.open_view(pool.descriptor())


def test_a_view_can_be_closed_while_a_slot_is_still_in_use(pool):
    view = pools.open_view(pool.descriptor())
    view.write(make_slot("a1"), bytes(range(240)), "me")
    data = view.read(make_slot("a1"), copy=False)
    view.close()
    view.close()
    assert bytes(data) == bytes(range(240))


def test_a_pool_that_does_not_fit_is_refused_with_what_to_do_and_leaves_nothing(shm):
    with pytest.raises(pools.PoolError, match=r"no room for a pool of \d+ bytes in .* free .*lower cache.pool_bytes"):
        SharedMemoryPool("big", 1 << 50, directory=shm)
    assert list(shm.iterdir()) == []


@pytest.mark.parametrize("pool_id", ["", "../x", "a b", "x" * 65, "a\n"])
def test_a_pool_id_that_is_not_a_file_name_is_refused(pool_id, shm):
    with pytest.raises(pools.PoolError, match="pool id"):
        SharedMemoryPool(pool_id, MIB, directory=shm)


def test_an_empty_pool_or_a_second_one_of_the_same_id_is_refused(pool, shm):
    with pytest.raises(pools.PoolError, match="a pool of 0 bytes"):
        SharedMemoryPool("zero", 0, directory=shm)
    with pytest.raises(pools.PoolError, match="File exists"):
        SharedMemoryPool("a1", MIB, directory=shm)
    assert [path.name for path in shm.iterdir()] == ["epd-a1"]


def test_a_view_of_something_else_is_refused(pool, shm):
    with pytest.raises(pools.PoolError, match="has 1048576 bytes, not 4096"):
        SharedMemoryView(msgspec.structs.replace(pool.descriptor(), nbytes=4096))
    (shm / "link").symlink_to(shm / "epd-a1")
    with pytest.raises(pools.PoolError, match="cannot be opened"):
        SharedMemoryView(msgspec.structs.replace(pool.descriptor(), name=str(shm / "link")))


def test_an_unknown_kind_is_refused_and_the_known_ones_are_named():
    unknown = Pool(pool_id="c3", kind="cuda_ipc", name="x", nbytes=MIB, host="h")
    for call in (lambda: pools.create("cuda_ipc", "c3", MIB, True), lambda: pools.open_view(unknown)):
        with pytest.raises(pools.PoolKindError, match="'cuda_ipc' are not available here; available: shared_memory"):
            call()


def test_pools_are_created_by_kind_in_dev_shm():
    owner = pools.create("shared_memory", f"test-{os.getpid()}", MIB, False)
    try:
        assert Path(owner.descriptor().name).parent == DIRECTORY and not owner.descriptor().checksum
    finally:
        owner.close()


def test_the_segment_of_a_killed_owner_is_swept_and_one_of_a_living_owner_is_not(dying_owner, pool, shm):
    process, descriptor = dying_owner
    view = pools.open_view(descriptor)
    assert sweep_stale(shm) == []
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (shm / "epd-b2").exists(), "nobody has cleaned up after it yet"
    assert sweep_stale(shm) == ["epd-b2"]
    assert [path.name for path in shm.iterdir()] == ["epd-a1"]
    assert sweep_stale(shm) == []
    view.write(make_slot("b2"), bytes(240), "me")
    assert bytes(view.read(make_slot("b2"))) == bytes(240)
    view.close()


def test_the_sweep_leaves_alone_what_is_not_a_segment_of_ours(shm):
    (shm / "other").touch()
    (shm / "epd-folder").mkdir()
    (shm / "epd-link").symlink_to(shm / "other")
    os.mkfifo(shm / "epd-pipe")
    try:
        assert sweep_stale(shm) == []
        assert {path.name for path in shm.iterdir()} == {"other", "epd-folder", "epd-link", "epd-pipe"}
    finally:
        (shm / "epd-folder").rmdir()


def test_a_pool_swept_before_it_was_locked_is_made_again(shm, monkeypatch):
    real, swept = fcntl.flock, []

    def sweep_first(fd, operation):
        if not swept:
            swept.append("now")
            swept[:] = sweep_stale(shm)
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", sweep_first)
    owner = SharedMemoryPool("a1", MIB, directory=shm)
    assert swept == ["epd-a1"] and (shm / "epd-a1").exists()
    assert sweep_stale(shm) == [], "the second one is locked"
    owner.close()

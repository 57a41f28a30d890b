"""Pools for tests: a folder for segments, a pool in GPU memory over a fake of CUDA, a pool of another host."""

import os

import pytest

from cache.pools.cuda_ipc import CudaIpcPool, CudaIpcView
from cache.pools.shared_memory import DIRECTORY


@pytest.fixture
def shm():
    """A folder of its own in /dev/shm, so that no other test's segments are in reach."""
    folder = DIRECTORY / f"epd-test-{os.getpid()}"
    folder.mkdir()
    yield folder
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


@pytest.fixture
def cuda():
    from tests.cache.fake_cuda import FakeCuda

    return FakeCuda()


@pytest.fixture
def pool(cuda, shm):
    owner = CudaIpcPool("g1", 1 << 20, runtime=cuda, directory=shm)
    yield owner
    owner.close()


@pytest.fixture
def opened(pool, cuda):
    """Opens views; each is one more process, or one that there is."""
    from tests.cache.fake_cuda import Process

    views = []

    def open_one(process=None):
        process = process or Process(cuda)
        views.append(CudaIpcView(pool.descriptor(), runtime=process, events=process.events))
        return views[-1]

    yield open_one
    for view in views:
        view.close()


@pytest.fixture
def served():
    """A pool of a host called "far"."""
    from tests.cache.served import Served

    made = Served()
    yield made
    made.close()

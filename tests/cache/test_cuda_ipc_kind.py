"""The kind "cuda_ipc" where there is no GPU, and what `CupyRuntime` makes of CUDA's answers, over a stub of CuPy."""

import subprocess
import sys
from pathlib import Path

import pytest

from cache import pools
from cache.pools.cuda_ipc_runtime import CupyRuntime, why_unavailable
from epd.messages import Pool

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


class StubCuda:
    """`cupy.cuda.runtime` as far as a test needs it: status codes are handed out as they are, the device is kept."""

    eventInterprocess = 4
    eventDisableTiming = 2

    def __init__(self):
        self.status = 0
        self.device = 0
        self.calls = []

    def getDevice(self):
        return self.device

    def setDevice(self, device):
        self.device = device

    def eventQuery(self, event):
        return self.status

    def check_status(self, status):
        self.calls.append(("cleared", status))
        raise RuntimeError(f"status {status}")

    def eventCreateWithFlags(self, flags):
        self.calls.append(("event", flags, self.device))
        return 7

    def malloc(self, nbytes):
        raise RuntimeError("cudaErrorMemoryAllocation")


@pytest.fixture
def cuda():
    return StubCuda()


@pytest.fixture
def runtime(cuda):
    made = object.__new__(CupyRuntime)
    made._cuda = cuda
    return made


def test_an_event_is_done_not_done_or_an_error_and_cudas_last_error_is_cleared(runtime, cuda):
    assert runtime.is_done(1) and cuda.calls == []
    cuda.status = 600
    assert not runtime.is_done(1) and cuda.calls == [("cleared", 600)]
    cuda.status = 700
    with pytest.raises(RuntimeError, match="status 700"):
        runtime.is_done(1)


def test_the_current_device_is_the_same_afterwards_whatever_happens(runtime, cuda):
    assert runtime.create_event(3) == 7
    assert cuda.calls == [("event", 6, 3)] and cuda.device == 0
    with pytest.raises(RuntimeError, match="MemoryAllocation"):
        runtime.allocate(2, MIB)
    assert cuda.device == 0


def test_pools_are_imported_without_torch_or_cupy():
    code = """
import sys
import cache.pools.cuda_ipc
print([name for name in ("torch", "cupy", "numpy") if name in sys.modules])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.strip() == "[]"
    assert pools.KINDS == ("shared_memory", "cuda_ipc")


@pytest.mark.parametrize("error", ["ValueError('numpy.dtype size changed')", "AttributeError('float_')"])
def test_a_cupy_that_cannot_be_imported_is_a_reason_whatever_it_raises(tmp_path, error):
    (tmp_path / "cupy").mkdir()
    (tmp_path / "cupy" / "__init__.py").write_text(f"raise {error}\n")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from cache.pools.cuda_ipc_runtime import why_unavailable
print(why_unavailable())
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.strip() == error.replace("('", ": ").removesuffix("')")


@pytest.mark.skipif(why_unavailable() is None, reason="there is a GPU")
def test_without_a_gpu_the_kind_is_refused_with_the_reason():
    named = Pool(pool_id="g3", kind="cuda_ipc", name="{}", nbytes=MIB, host="h")
    for call in (lambda: pools.create("cuda_ipc", "g3", MIB, False), lambda: pools.open_view(named)):
        with pytest.raises(pools.PoolKindError, match=r"available: shared_memory \(cuda_ipc: "):
            call()
    with pytest.raises(pools.PoolKindError, match=r"'tape' are not available here; available: shared_memory$"):
        pools.create("tape", "g3", MIB, False)

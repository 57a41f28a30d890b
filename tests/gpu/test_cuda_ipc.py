"""Pools in GPU memory on a real GPU: runs `tests/gpu/run.py` once and asks for each thing that has to hold."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from cache.pools.cuda_ipc_runtime import why_unavailable

ROOT = Path(__file__).resolve().parents[2]


def why_not():
    """Why this cannot run here; None where it can."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    if (reason := why_unavailable()) is not None:
        return f"no CUDA for pools: {reason}"
    import torch

    return None if torch.cuda.is_available() else "torch sees no CUDA device"


pytestmark = [pytest.mark.gpu, pytest.mark.timeout(360)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    path = tmp_path_factory.mktemp("gpu") / "gpu_pool.json"
    command = [sys.executable, str(ROOT / "tests/gpu/run.py"), "--json", str(path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=340, check=False)
    assert path.exists(), result.stdout + result.stderr
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    "what",
    [
        "nothing read wrong",
        "everything stale refused",
        "without waiting for events, data would be wrong",
        "every view inside the pool",
        "no view copies",
        "a view's time does not grow with its size",
        "write bandwidth 0.9 of a plain copy (256 MiB)",
        "at most 4 GB of device memory",
        "dead writer's unfinished slot refused",
        "dead writer's settled slot read",
    ],
)
def test_it_holds_on_this_gpu(results, what):
    assert results["verdict"][what]


def test_so_many_writes_were_checked(results):
    assert results["correctness"]["writes"] == 10_000 and results["correctness"]["stale_refused"] > 500

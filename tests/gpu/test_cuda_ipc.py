"""Pools in GPU memory on a real GPU: runs `tests/gpu/run.py` once and asks for each thing that has to hold."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu.common import why_not
from tests.gpu.report import CHECKS

ROOT = Path(__file__).resolve().parents[2]

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


@pytest.mark.parametrize("what", CHECKS)
def test_it_holds_on_this_gpu(results, what):
    assert results["verdict"][what]


def test_so_many_writes_were_checked(results):
    assert results["correctness"]["writes"] == 10_000 and results["correctness"]["stale_refused"] > 500

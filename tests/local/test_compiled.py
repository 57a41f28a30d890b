"""What torch compiles for an engine outlives the run: nothing that takes seconds to make lies in the run's folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from epd.local.environment import scratch_environment

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]

CODE = """
from epd.local.environment import set_engine_environment
set_engine_environment("builtin")
import torch
print(torch.compile(lambda x: (x.sin() > 0).sum(-1))(torch.zeros(2, 3)).tolist())
"""


def test_a_run_compiles_into_the_folder_that_stays_and_keeps_no_header_of_its_own(tmp_path: Path) -> None:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TORCHINDUCTOR_")}
    env = inherited | scratch_environment(tmp_path) | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, check=False)
    assert done.stdout == "[0, 0]\n", done.stderr
    assert not Path(env["TORCHINDUCTOR_CACHE_DIR"]).is_relative_to(tmp_path)
    assert list(Path(env["TORCHINDUCTOR_CACHE_DIR"]).rglob("*.so"))
    left = {path.relative_to(tmp_path): path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()}
    assert sum(left.values()) < 1 << 20, left

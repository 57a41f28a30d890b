"""Run by test_engines.py in a process of its own: by how much memory grows when a tower encodes, as one JSON object.

Arguments: the number of patches. The tower has two layers of the size of MiniCPM-V 2.6's, with fused attention.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers

LAYER = {"hidden_size": 1152, "intermediate_size": 4304, "num_attention_heads": 16, "image_size": 448, "patch_size": 14}


def peak_bytes() -> int:
    """The most memory that this process has had so far; what getrusage says begins with its parent's."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) << 10


def main() -> None:
    torch.set_num_threads(1)
    config = transformers.SiglipVisionConfig(**LAYER, num_hidden_layers=2, vision_use_head=False)
    tower = transformers.SiglipVisionModel(config).to(torch.bfloat16).eval()
    pixels = torch.zeros(int(sys.argv[1]), 3, 448, 448, dtype=torch.bfloat16)
    with torch.inference_mode():
        tower(pixels[:1])  # what is made once
        before = peak_bytes()
        tower(pixels)
    print(json.dumps({"grown": peak_bytes() - before, "attention": tower.config._attn_implementation}), flush=True)


if __name__ == "__main__":
    main()

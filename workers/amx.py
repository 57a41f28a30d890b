"""Asks Linux for the use of AMX tile registers, which vLLM's attention for CPUs uses without asking.

Lives in each process with an engine; called before the engine is built. Written against vLLM 0.32
(`vllm.v1.attention.backends.cpu_attn`).
"""

from __future__ import annotations

import torch


def permit_amx() -> None:
    """Asks for the registers if the processor has them.

    Otherwise their first use is an illegal instruction, unless oneDNN has asked before. It does so for large matrices
    only, and a decode worker may never have one.
    """
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()

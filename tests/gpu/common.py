"""What the processes of `tests/gpu/run.py` share: slots, contents that tell themselves apart, and how they fail."""

from __future__ import annotations

import contextlib
import importlib.util
import statistics
import traceback

from cache.pools.cuda_ipc_headers import granule_for
from cache.pools.cuda_ipc_runtime import why_unavailable
from cache.slot import data_bytes, slot_bytes
from epd.messages import Slot

POOL_ID = "gpu-test"
POOL_BYTES = 1 << 30
MIB = 1 << 20
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


def why_not():
    """Why nothing of this can run here; None where it can. Imports torch."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    if (reason := why_unavailable()) is not None:
        return f"no CUDA for pools: {reason}"
    import torch

    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def guarded(target, connection, *arguments):
    """Runs `target`; what it raises goes to the parent."""
    try:
        target(connection, *arguments)
    except BaseException:
        with contextlib.suppress(OSError):
            connection.send(("error", traceback.format_exc()))


def pattern(nbytes, seed):
    """`nbytes` of contents that differ in every word with the seed, made on the GPU: int32."""
    import torch

    return torch.arange(nbytes // 4, dtype=torch.int32, device="cuda").mul_(2 * seed + 1).add_(seed)


def contents(slot):
    """The pattern of a slot's generation, as a tensor that fits the slot."""
    import torch

    nbytes = data_bytes(slot.num_tokens, slot.width, slot.dtype)
    return pattern(nbytes, slot.generation).view(getattr(torch, slot.dtype)).view(slot.num_tokens, slot.width)


def differs(tensor, slot):
    """Whether a tensor has any other contents than `contents(slot)`: a tensor, so that nobody waits for it."""
    import torch

    return (tensor.view(torch.int32).reshape(-1) != pattern(tensor.nbytes, slot.generation)).any()


def consume(view, slot):
    """Reads a slot, uses it on the GPU, and returns when that is done."""
    import torch

    view.read(slot).sum()
    torch.cuda.current_stream().synchronize()


def make_slot(offset, generation, nbytes, dtype):
    """A slot for `nbytes` of data in rows of 1 KiB."""
    width = 1024 // ITEMSIZE[dtype]
    rows = nbytes // 1024
    size = max(slot_bytes(rows, width, dtype), granule_for(POOL_BYTES))
    return Slot(
        pool_id=POOL_ID, offset=offset, nbytes=size, generation=generation, num_tokens=rows, width=width, dtype=dtype
    )


def spread(name, values):
    """Median and 99th percentile."""
    ordered = sorted(values)
    return {
        f"{name}_p50": statistics.median(ordered),
        f"{name}_p99": ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)],
    }

"""What the processes of `tests/gpu/run.py` share: slots, contents that tell themselves apart, and how they fail."""

from __future__ import annotations

import contextlib
import statistics
import traceback

from cache.pools.cuda_ipc_headers import granule_for
from cache.slot import slot_bytes
from epd.messages import Slot

POOL_ID = "gpu-test"
POOL_BYTES = 1 << 30
MIB = 1 << 20
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


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

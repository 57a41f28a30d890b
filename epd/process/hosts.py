"""Which host a process is on: the memory of pools is shared by processes of one host.

For pools in GPU memory, containers of one host must share the namespace of process ids too: see `cache.pools.cuda_ipc`.

Lives in every process that registers with the broker; pure.
"""

from __future__ import annotations

import os
import socket

VARIABLE = "EPD_HOST"


def this_host() -> str:
    """The host's name, or what `EPD_HOST` says: containers that share `/dev/shm` are one host with several names."""
    return os.environ.get(VARIABLE) or socket.gethostname()

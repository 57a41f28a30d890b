"""What a process holds, as far as any process can tell: tasks, threads, file descriptors.

Lives in every process; pure but for reading `/proc`. Each daemon adds its own counts. When nothing is in flight, they
are all back at what they were before: the idle baseline.
"""

from __future__ import annotations

import asyncio
import os
import threading

_FDS = "/proc/self/fd"


def of_process(loop: asyncio.AbstractEventLoop | None = None) -> dict[str, int]:
    """Counts of this process; `loop` is its event loop, for calls from elsewhere.

    `tasks` are asyncio's, `threads` those that Python knows, `fds` the open file descriptors (-1 if the system does not
    say).
    """
    try:
        num_fds = len(os.listdir(_FDS)) - 1  # the one that reads this
    except OSError:
        num_fds = -1
    return {"tasks": len(asyncio.all_tasks(loop)), "threads": threading.active_count(), "fds": num_fds}

"""What a process holds, as far as any process can tell: tasks, threads, file descriptors.

Lives in every process; pure but for reading `/proc`. Each daemon adds what is its own. When nothing is in flight all of
it is back at what it was before: the idle baseline.
"""

from __future__ import annotations

import asyncio
import os
import threading

_FDS = "/proc/self/fd"


def of_process(loop: asyncio.AbstractEventLoop | None = None) -> dict[str, int]:
    """Counts of this process; `loop` is its event loop, where this is not called on it.

    `tasks` are asyncio's, `threads` those that Python knows, `fds` the open file descriptors (-1 where the system does
    not tell).
    """
    try:
        num_fds = len(os.listdir(_FDS)) - 1  # the one that reads this
    except OSError:
        num_fds = -1
    return {"tasks": len(asyncio.all_tasks(loop)), "threads": threading.active_count(), "fds": num_fds}

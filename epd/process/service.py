"""Keeps a process from outliving the one that started it.

Lives in every process; owns nothing. How daemons start and stop is in `epd.process.lifecycle`, what they log in `logs`.
"""

from __future__ import annotations

import ctypes
import signal


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Asks Linux to send this process `number` when its parent dies, so that nothing is left behind."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, number)

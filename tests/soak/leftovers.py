"""What a pipeline may leave on its host: processes and files in shared memory. Reads /proc, for Linux."""

from __future__ import annotations

import os
from pathlib import Path

SHM = Path("/dev/shm")


def descendants(of: int) -> dict[int, str]:
    """All processes below one, and the state of each as in /proc ("Z": a zombie)."""
    parents: dict[int, tuple[int, str]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except OSError:
                continue
            parents[int(entry.name)] = (int(parent), state)
    found: dict[int, str] = {}
    below = {of}
    while below:
        below = {pid for pid, (parent, _) in parents.items() if parent in below and pid not in found}
        found |= {pid: parents[pid][1] for pid in below}
    return found


def pool_files() -> set[Path]:
    """The files of all pools on this host, whosever they are."""
    return set(SHM.glob("epd-*"))


def pools_of(pid: int) -> set[Path]:
    """The pools that a process has open."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target.startswith(f"{SHM}/epd-"):
            found.add(Path(target.removesuffix(" (deleted)")))
    return found

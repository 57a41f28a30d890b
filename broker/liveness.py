"""Who is away, and who only seems to be here: absent stages and hung engines. Pure.

Part of the decision core. A stage that was there a moment ago is probably being started again: requests wait for it. An
engine that has something to do and makes no step is lost, however well its daemon's event loop answers.
"""

from __future__ import annotations

from broker.board import Board
from broker.registry import Peer
from epd.messages import STAGES, Role

POOL = "cache"


class Liveness:
    """Follows the peers on the board."""

    def __init__(self, board: Board) -> None:
        self._board = board
        self._absent_since: dict[str, float] | None = None

    def update(self, now: float) -> None:
        """Notes since when each stage, and the cache, has nobody who takes work; at first that is since `now`."""
        board, before = self._board, self._absent_since
        absent = [str(stage) for stage in STAGES if not board.registry.serving(stage)]
        absent += [] if board.patches.index.pools else [POOL]
        self._absent_since = {name: (before or {}).get(name, now) for name in absent}

    def absent(self, names: list[str]) -> list[str]:
        """Those of `names` (stages, or "cache") that nobody stands for at present."""
        return [name for name in names if name in (self._absent_since or {})]

    def gone(self, names: list[str], now: float) -> list[str]:
        """Those of `names` that have been absent for longer than they are waited for."""
        since, grace_s = self._absent_since or {}, self._board.config.absence_grace_s
        return [name for name in names if name in since and now - since[name] >= grace_s]

    def hung(self, now: float) -> list[Peer]:
        """The workers that hold something and whose engines have made no step for too long."""
        owing = {peer_id for peers in self._board.releasing.values() for peer_id in peers}
        found = []
        for peer in self._board.registry:
            if peer.role not in STAGES or not (peer.jobs or peer.requests or peer.peer_id in owing):
                peer.stepped_at = now
            elif now - peer.stepped_at >= self._board.config.hung_after_s:
                found.append(peer)
        return found

    def heard_steps(self, peer: Peer, num_steps: int, now: float) -> None:
        """A worker's heartbeat says how many steps its engine has made."""
        if num_steps != peer.num_steps:
            peer.num_steps, peer.stepped_at = num_steps, now


def named(names: list[str], article: str) -> str:
    """What people call those of `names`, as in "no encode worker and no cache"."""
    return " and ".join(f"{article} {name}" if name == POOL else f"{article} {name} worker" for name in names)


def needed(has_patches: bool) -> list[str]:
    """What a request cannot start without."""
    stages = [str(Role.PREFILL), str(Role.DECODE)]
    return [str(Role.ENCODE), *stages, POOL] if has_patches else stages

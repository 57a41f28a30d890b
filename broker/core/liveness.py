"""Who is away, and who only seems to be there: absent stages, silent peers and hung engines. Pure.

Part of the decision core. A stage that was there a moment ago is probably being restarted, so requests wait for it. An
engine that has work but makes no step is lost, even if its daemon's event loop still answers. Each peer is checked when
its own time may be up, not at every tick.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from broker.core.peers import Peer, Registry, Stages, Worker
from broker.core.timers import Timers
from epd.config import BrokerConfig
from epd.messages import Stage

POOL = "cache"
# What requests need, by class of the queue. Text needs no encode worker and no cache.
TEXT, MEDIA = "text", "media"
NEEDED = {
    TEXT: (str(Stage.PREFILL), str(Stage.DECODE)),
    MEDIA: (str(Stage.ENCODE), str(Stage.PREFILL), str(Stage.DECODE), POOL),
}
UPLOAD_NEEDS = (str(Stage.ENCODE), POOL)

OnGone = Callable[[float], None]
Lose = Callable[[Peer, str, float], None]


class Liveness:
    """Follows the peers.

    Args:
        config: how long to wait.
        timers: for checking when a time is up.
        registry: the peers.
        stages: the workers that take new work.
        has_pool: whether there is any pool.

    Attributes:
        blocked: the classes of requests that cannot be started because something that they need is absent.
        on_gone: called when something has been absent for too long.
        lose: called for a peer that is lost, with the reason.
    """

    on_gone: OnGone
    lose: Lose

    def __init__(
        self, config: BrokerConfig, timers: Timers, registry: Registry, stages: Stages, has_pool: Callable[[], bool]
    ) -> None:
        self._config, self._timers, self._registry, self._stages = config, timers, registry, stages
        self._has_pool = has_pool
        self._absent_since: dict[str, float] | None = None
        self.blocked: frozenset[str] = frozenset()

    # ---- stages and the cache --------------------------------------------------------------------------------------

    def update(self, now: float) -> None:
        """Notes since when each stage, and the cache, has had nobody that takes work; `now` for new absences."""
        before = self._absent_since or {}
        absent = [str(stage) for stage in Stage if not len(self._stages[stage])]
        absent += [] if self._has_pool() else [POOL]
        self._absent_since = {name: before.get(name, now) for name in absent}
        self.blocked = frozenset(
            kind for kind, names in NEEDED.items() if not self._absent_since.keys().isdisjoint(names)
        )
        for name, since in self._absent_since.items():
            if name not in before:
                self._timers.set(since + self._config.absence_grace_s, self._look)

    def _look(self, now: float) -> None:
        if any(now - since >= self._config.absence_grace_s for since in (self._absent_since or {}).values()):
            self.on_gone(now)

    def are_absent(self, names: Collection[str]) -> bool:
        """Whether any of `names` (stages, or "cache") is absent now."""
        return not (self._absent_since or {}).keys().isdisjoint(names)

    def gone(self, names: Collection[str], now: float) -> list[str]:
        """Those of `names` that have been absent for longer than requests wait for them."""
        since = self._absent_since
        if not since:
            return []
        return [name for name in names if name in since and now - since[name] >= self._config.absence_grace_s]

    # ---- peers -----------------------------------------------------------------------------------------------------

    def watch(self, peer: Peer) -> None:
        """A peer has registered: from now on it is lost if it is silent for too long.

        Messages only move `heard_at`; the timer looks at it when it runs, so that they cost no work on the heap.
        """
        self._timers.set(peer.heard_at + self._config.lost_after_s, lambda now: self._is_silent(peer, now))

    def _is_silent(self, peer: Peer, now: float) -> None:
        if self._registry.get(peer.peer_id) is not peer:
            return
        if now - peer.heard_at > self._config.lost_after_s:
            self.lose(peer, f"silent for {now - peer.heard_at:.1f} s", now)
        else:
            at = max(peer.heard_at + self._config.lost_after_s, now + 0.01)
            self._timers.set(at, lambda now: self._is_silent(peer, now))

    def gave(self, worker: Worker, now: float) -> None:
        """A worker was given something to do: from now on it is lost if its engine makes no step for too long."""
        if worker.num_pending == 1:  # it was idle: an engine with nothing to do makes no steps
            worker.stepped_at = now
        if worker.hang_check is None:
            self._set_hang_check(worker, now + self._config.hung_after_s)

    def heard_steps(self, worker: Worker, num_steps: int, now: float) -> None:
        """A worker's heartbeat says how many steps its engine has made."""
        if num_steps != worker.num_steps:
            worker.num_steps, worker.stepped_at = num_steps, now

    def _set_hang_check(self, worker: Worker, at: float) -> None:
        worker.hang_check = self._timers.set(at, lambda now: self._is_hung(worker, now))

    def _is_hung(self, worker: Worker, now: float) -> None:
        worker.hang_check = None
        if self._registry.get(worker.peer_id) is not worker or not worker.num_pending:
            return
        if now - worker.stepped_at >= self._config.hung_after_s:
            self.lose(worker, f"its engine hangs: no step for {now - worker.stepped_at:.0f} s", now)
        else:
            self._set_hang_check(worker, worker.stepped_at + self._config.hung_after_s)


def named(names: list[str], article: str) -> str:
    """`names` in words, as in "no encode worker and no cache"."""
    return " and ".join(f"{article} {name}" if name == POOL else f"{article} {name} worker" for name in names)

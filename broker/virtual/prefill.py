"""A prefill worker in virtual time. Pure.

A step computes what can be computed of the prompts that are here, in the order they came, up to a number of tokens: of
a prompt whose patches are missing, what comes before the first of them. KV that is computed is pushed as soon as the
decode worker has registered for it; pushes run beside the steps.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from broker.virtual.costs import FREE, CostModel
from broker.virtual.workers import EngineRequest, KvWorker, engine_request
from epd import messages as m
from epd.messages import Message, Stage

if TYPE_CHECKING:
    from broker.virtual.network import Network


@dataclasses.dataclass(slots=True)
class _Leg:
    """A leg whose prompt is computed here, or whose KV is still to be pushed."""

    message: m.Prefill
    request: EngineRequest
    num_tokens: int
    missing: set[str]
    num_computed: int = 0
    took_s: float = 0.0

    @property
    def num_ready(self) -> int:
        """How many tokens can be computed with the patches that are here."""
        if not self.missing:
            return self.num_tokens
        starts = zip(self.request.patches, self.request.starts, strict=False)
        return min((start for patch_hash, start in starts if patch_hash in self.missing), default=0)


class PrefillWorker(KvWorker):
    """Computes prompts.

    Args:
        max_batched_tokens: the most tokens of one step.
        min_overlap_tokens: the fewest tokens worth a step while patches are missing.
        others: see `broker.virtual.workers.StageWorker`.
    """

    role = Stage.PREFILL

    def __init__(
        self,
        network: Network,
        name: str,
        info: m.WorkerInfo,
        costs: CostModel = FREE,
        host: str = "h",
        restart_s: float | None = 2.0,
        *,
        max_batched_tokens: int = 8192,
        min_overlap_tokens: int = 512,
    ) -> None:
        super().__init__(network, name, info, costs, host, restart_s)
        self._max_batched_tokens, self._min_overlap_tokens = max_batched_tokens, min_overlap_tokens

    def _reset(self) -> None:
        self._legs: dict[str, _Leg] = {}
        self._runnable: dict[str, _Leg] = {}  # of these, whose next tokens can be computed
        self._computed: dict[str, _Leg] = {}
        self._batch: list[tuple[str, _Leg, int]] = []
        self._registered: dict[str, str] = {}

    def holds(self) -> int:
        """Its legs."""
        return len(self._legs) + len(self._computed)

    # ---- from the broker -------------------------------------------------------------------------------------------

    def take(self, message: Message, frames: Sequence[bytes]) -> None:
        """Handles legs, their patches, and aborts."""
        match message:
            case m.Prefill():
                request = engine_request(frames)
                missing = set(request.patches).difference(one.patch_hash for one in message.ready)
                num_tokens = request.num_prompt_tokens + len(message.output_token_ids)
                self._legs[message.leg_id] = _Leg(message, request, num_tokens, missing)
                self._look_at(message.leg_id)
            case m.Ready() if leg := self._legs.get(message.leg_id):
                leg.missing.difference_update(one.patch_hash for one in message.ready)
                self._look_at(message.leg_id)
            case m.Abort(leg_id=leg_id):
                for table in (self._legs, self._runnable, self._computed, self._registered):
                    table.pop(leg_id, None)
                self.say(m.Released(leg_id=leg_id))
                self._leave_if_done()

    def _look_at(self, leg_id: str) -> None:
        leg = self._legs[leg_id]
        num_new = leg.num_ready - leg.num_computed
        if num_new >= self._min_overlap_tokens or (num_new and not leg.missing):
            self._runnable[leg_id] = leg
            self.wake()
        else:
            self._runnable.pop(leg_id, None)

    # ---- the engine ------------------------------------------------------------------------------------------------

    def _begin_step(self) -> float | None:
        left, num_context = self._max_batched_tokens, 0
        for leg_id, leg in self._runnable.items():
            num_new = min(leg.num_ready - leg.num_computed, left)
            self._batch.append((leg_id, leg, num_new))
            num_context += leg.num_computed
            left -= num_new
            if not left:
                break
        return self._costs.prefill_s(self._max_batched_tokens - left, num_context) if self._batch else None

    def _end_step(self, took_s: float) -> int:
        batch, self._batch = self._batch, []
        for leg_id, leg, num_new in batch:
            if self._legs.get(leg_id) is not leg:  # aborted meanwhile
                continue
            leg.num_computed += num_new
            leg.took_s += took_s
            if leg.num_computed == leg.num_tokens:
                self._finish(leg_id, leg)
            else:
                self._look_at(leg_id)
        return sum(num_new for _, _, num_new in batch)

    def _finish(self, leg_id: str, leg: _Leg) -> None:
        del self._legs[leg_id]
        self._runnable.pop(leg_id, None)
        num_before = len(leg.message.output_token_ids)
        token_ids = [num_before] if leg.message.samples else []
        is_last = bool(token_ids) and (leg.message.is_last or num_before + 1 >= leg.request.num_outputs)
        if not is_last:
            self._computed[leg_id] = leg
        reason = "length" if is_last else ""
        self.say(m.Prefilled(leg_id=leg_id, took_s=leg.took_s, token_ids=token_ids, finish_reason=reason))
        self._push(leg_id)

    # ---- KV --------------------------------------------------------------------------------------------------------

    def register(self, leg_id: str, engine_id: str) -> None:
        """A decode worker waits for a leg's KV."""
        self._registered[leg_id] = engine_id
        self._push(leg_id)

    def _push(self, leg_id: str) -> None:
        leg = self._computed.get(leg_id)
        if leg is not None and leg_id in self._registered:
            engine_id = self._registered.pop(leg_id)
            self.later(self._costs.push_s(leg.num_tokens), partial(self._pushed, leg_id, leg, engine_id))

    def _pushed(self, leg_id: str, leg: _Leg, engine_id: str) -> None:
        if self._computed.get(leg_id) is not leg:  # aborted meanwhile
            return
        del self._computed[leg_id]
        if decode := self.network.engines.get(engine_id):
            decode.kv_there(leg_id)
        self.say(m.Pushed(leg_id=leg_id))
        self._leave_if_done()

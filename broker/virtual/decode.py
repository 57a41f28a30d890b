"""A decode worker in virtual time. Pure.

All legs whose KV is here are in each step, and get a token by it: the number of tokens of the answer that came before,
so that a token that is missing or comes twice shows. What a step has given them goes to the broker in one message.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from broker.virtual.workers import EngineRequest, KvWorker, engine_request
from epd import messages as m
from epd.messages import LegOutput, Message, Stage


@dataclasses.dataclass(slots=True)
class _Leg:
    """A leg that is decoded here, once its KV (and the token that prefill samples, if it does) is there."""

    message: m.Decode
    request: EngineRequest
    num_tokens: int
    kv_there: bool = False
    awaits_token: bool = False
    has_output: bool = False

    @property
    def num_context_tokens(self) -> int:
        return self.request.num_prompt_tokens + self.num_tokens


class DecodeWorker(KvWorker):
    """Decodes; the broker ensures that what it is given fits."""

    role = Stage.DECODE

    def _reset(self) -> None:
        self._legs: dict[str, _Leg] = {}
        self._running: dict[str, _Leg] = {}
        self._batch: list[tuple[str, _Leg]] = []

    def holds(self) -> int:
        """Its legs."""
        return len(self._legs)

    # ---- from the broker and from prefill workers ------------------------------------------------------------------

    def take(self, message: Message, frames: Sequence[bytes]) -> None:
        """Handles legs, their first tokens, and aborts."""
        match message:
            case m.Decode(leg_id=leg_id):
                num_tokens = len(message.output_token_ids)
                self._legs[leg_id] = _Leg(
                    message, engine_request(frames), num_tokens, awaits_token=message.awaits_token
                )
                if prefill := self.network.engines.get(message.prefill.engine_id):
                    prefill.register(leg_id, self.engine_id)
            case m.Prefilled(leg_id=leg_id) if waiting := self._legs.get(leg_id):
                waiting.num_tokens += len(message.token_ids)
                waiting.awaits_token = False
                self._look_at(leg_id, waiting)
            case m.Abort(leg_id=leg_id):
                self._legs.pop(leg_id, None)
                self._running.pop(leg_id, None)
                self.say(m.Released(leg_id=leg_id))
                self._leave_if_done()

    def kv_there(self, leg_id: str) -> None:
        """A prefill worker has pushed a leg's KV."""
        if leg := self._legs.get(leg_id):
            leg.kv_there = True
            self._look_at(leg_id, leg)

    def _look_at(self, leg_id: str, leg: _Leg) -> None:
        if leg.kv_there and not leg.awaits_token:
            self._running[leg_id] = leg
            self.wake()

    # ---- the engine ------------------------------------------------------------------------------------------------

    def _begin_step(self) -> float | None:
        if not self._running:
            return None
        self._batch = list(self._running.items())
        return self._costs.decode_s(len(self._batch), sum(leg.num_context_tokens for _, leg in self._batch))

    def _end_step(self, took_s: float) -> int:
        batch, self._batch = self._batch, []
        outputs = [self._output(leg_id, leg) for leg_id, leg in batch if self._legs.get(leg_id) is leg]
        if outputs:
            self.say(m.StepOutputs(outputs=outputs))
        return len(batch)

    def _output(self, leg_id: str, leg: _Leg) -> LegOutput:
        num_before = leg.num_tokens
        num_pushed = -1 if leg.has_output else leg.request.num_prompt_tokens
        leg.num_tokens, leg.has_output = num_before + 1, True
        is_last = leg.num_tokens >= leg.request.num_outputs
        if is_last:
            del self._legs[leg_id], self._running[leg_id]
        return LegOutput(
            leg_id=leg_id, token_ids=[num_before], num_before=num_before, num_pushed_tokens=num_pushed,
            finish_reason="length" if is_last else "",
        )  # fmt: skip

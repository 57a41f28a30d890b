"""The prefill stage: prompt and embeddings in, KV pushed to the decode worker. Lives in its engine thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from epd.errors import ErrorCode
from epd.messages import (
    Abort,
    LegFailed,
    Message,
    PatchReady,
    Prefill,
    Prefilled,
    Pushed,
    Ready,
    Released,
    Stage,
    Stale,
)
from workers.leaks import LeakWatch
from workers.reading import ReadingStage
from workers.resources import blocks
from workers.stage import Frames, ever_later

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput

_PUSH_POLL_S = (0.0005, 0.02)
_PATCH_POLL_S = 1.0


class Leg(NamedTuple):
    """A leg that is being prefilled.

    `num_kept` output tokens of earlier legs follow the prompt. If it `samples`, its token counts, and `is_last` says
    that no other may follow.
    """

    num_kept: int
    samples: bool
    is_last: bool


class PrefillStage(ReadingStage):
    """Runs each request for one token: the first of its answer if that was asked for; otherwise it is thrown away."""

    stage = Stage.PREFILL

    def start(self) -> None:
        """Builds the engine."""
        super().start()
        self._legs: dict[str, Leg] = {}
        self._pushing: set[str] = set()
        self._leaks = LeakWatch()

    def handle(self, message: Message, frames: Frames) -> None:
        """Handles PREFILL, READY and ABORT."""
        match message:
            case Prefill() if self.is_new(message.leg_id):
                try:
                    is_last = self.engine.add_prefill(
                        message.leg_id,
                        frames,
                        message.output_token_ids,
                        message.samples,
                        keeps_kv=not message.is_last,
                    )
                except Exception as error:
                    text = f"{type(error).__name__}: {error}"[:500]
                    self._post(LegFailed(leg_id=message.leg_id, code=ErrorCode.ENGINE_FAILED, message=text), ())
                    return
                self._legs[message.leg_id] = Leg(
                    len(message.output_token_ids), message.samples, is_last or message.is_last
                )
                self._ready(message.leg_id, message.ready)
            case Ready():
                self._ready(message.leg_id, message.ready)
            case Abort():
                self.engine.abort([message.leg_id])
                self._legs.pop(message.leg_id, None)
                self._pushing.discard(message.leg_id)
                self._post(Released(leg_id=message.leg_id), ())

    def _stale(self, request_id: str, patch: PatchReady, reason: str) -> None:
        told = Stale(leg_id=request_id, patch_hash=patch.patch_hash, generation=patch.slot.generation, reason=reason)
        self._post(told, ())

    def step(self) -> bool:
        """Prefills what is ready, and notices finished pushes."""
        started = self.clock()
        self._look_at_slots()
        outputs, executed = self.engine.step()
        took_s, num_computed = self.clock() - started, 0
        for output in outputs:
            leg = self._legs.get(output.request_id)
            if leg is None or not output.finished:
                continue
            del self._legs[output.request_id]
            self.engine.connector.forget(output.request_id)
            reason = str(output.finish_reason)
            if reason not in ("length", "stop"):
                text = f"prefill ended with {reason}"
                self._post(LegFailed(leg_id=output.request_id, code=ErrorCode.ENGINE_FAILED, message=text), ())
                continue
            # vLLM ends every request here after one token ("length"); "stop" comes from the token itself.
            ends = leg.samples and (leg.is_last or reason == "stop")
            if not ends:
                self._pushing.add(output.request_id)
            stats = output.prefill_stats
            num_computed += stats.num_computed_tokens if stats else 0
            done = Prefilled(
                leg_id=output.request_id,
                num_cached_tokens=stats.num_local_cached_tokens if stats else 0,
                took_s=took_s,
                token_ids=list(output.new_token_ids) if leg.samples else [],
                finish_reason=reason if ends else "",
            )
            self._post(done, self._frames(output, leg, ends))
        for request_id in [one for one in self._pushing if not self.engine.holds(one)]:
            self._pushing.discard(request_id)
            self._post(Pushed(leg_id=request_id), ())
        if executed:
            self.did(took_s, num_computed)
        return executed

    def _frames(self, output: EngineCoreOutput, leg: Leg, ends: bool) -> Frames:
        """What the endpoint gets of an output: the token that was sampled, or the prompt's log-probabilities."""
        output.kv_transfer_params = None
        if leg.samples:
            if not ends:
                output.finish_reason = None
            return self.engine.pack(output)
        if output.new_prompt_logprobs_tensors is None:
            return ()
        if leg.num_kept:  # their rows come last
            output.new_prompt_logprobs_tensors = type(output.new_prompt_logprobs_tensors)(
                *(rows[: -leg.num_kept] for rows in output.new_prompt_logprobs_tensors[:3])
            )
        output.new_token_ids, output.new_logprobs, output.finish_reason = [], None, None
        return self.engine.pack(output)

    def poll_s(self, num_idle_steps: int) -> float | None:
        """Pushes under way are polled less and less often; patches announce themselves."""
        if (slots_s := super().poll_s(num_idle_steps)) is not None:
            return slots_s
        return ever_later(_PUSH_POLL_S, num_idle_steps) if self._pushing else _PATCH_POLL_S

    def held(self) -> dict[str, int]:
        """As in `StageRunner`, plus the requests that this stage knows."""
        return super().held() | {"requests": len(self._legs) + len(self._pushing)}

    def leak(self, now: float) -> str:
        """Looks for KV blocks that no request holds."""
        return self._leaks.observe(now, **blocks(self.engine, (*self._legs, *self._pushing)))

    def reset(self) -> None:
        """Drops all requests."""
        self.engine.abort([*self._legs, *self._pushing])
        self._legs.clear()
        self._pushing.clear()

"""The prefill stage: prompt and embeddings in, KV pushed to the decode worker. Lives in its engine thread."""

from __future__ import annotations

import dataclasses
import time

from cache.slot import StaleSlotError
from epd.messages import Abort, Failed, Message, PatchReady, Prefill, Prefilled, Pushed, Ready, Released, Role, Stale
from workers.stage import Frames, Stage

_PUSH_POLL_S = (0.0005, 0.02)
_PATCH_POLL_S = 1.0


@dataclasses.dataclass(slots=True)
class _Leg:
    received_at: float
    num_kept_outputs: int


class PrefillStage(Stage):
    """Runs each request for one token, which is thrown away: the decode worker samples the first one itself."""

    role = Role.PREFILL

    def start(self) -> None:
        """Builds the engine."""
        super().start()
        self._legs: dict[str, _Leg] = {}
        self._pushing: set[str] = set()

    def handle(self, message: Message, frames: Frames) -> None:
        """Takes in PREFILL, READY and ABORT."""
        match message:
            case Prefill() if message.request_id not in self._legs:
                try:
                    self.engine.add_prefill(message.request_id, frames, message.output_token_ids)
                except Exception as error:
                    text = f"{type(error).__name__}: {error}"[:500]
                    self._post(Failed(request_id=message.request_id, code="engine_failed", message=text), ())
                    return
                self._legs[message.request_id] = _Leg(time.monotonic(), len(message.output_token_ids))
                self._ready(message.request_id, message.ready)
            case Ready():
                self._ready(message.request_id, message.ready)
            case Abort():
                self.engine.abort([message.request_id])
                self._legs.pop(message.request_id, None)
                self._pushing.discard(message.request_id)
                self._post(Released(request_id=message.request_id), ())

    def _ready(self, request_id: str, ready: list[PatchReady]) -> None:
        for patch in ready:
            try:
                self.engine.connector.patch_ready(patch.patch_hash, patch.slot)
            except StaleSlotError as error:
                stale = Stale(
                    request_id=request_id,
                    patch_hash=patch.patch_hash,
                    generation=patch.slot.generation,
                    reason=str(error),
                )
                self._post(stale, ())

    def step(self) -> bool:
        """Prefills what is ready, and notices pushes that are done."""
        started = time.monotonic()
        outputs, executed = self.engine.step()
        for output in outputs:
            leg = self._legs.get(output.request_id)
            if leg is None or not output.finished:
                continue
            del self._legs[output.request_id]
            self.engine.connector.forget(output.request_id)
            if str(output.finish_reason) not in ("length", "stop"):
                text = f"prefill ended with {output.finish_reason}"
                self._post(Failed(request_id=output.request_id, code="engine_failed", message=text), ())
                continue
            self._pushing.add(output.request_id)
            stats = output.prefill_stats
            done = Prefilled(
                request_id=output.request_id,
                num_cached_tokens=stats.num_local_cached_tokens if stats else 0,
                queued_s=started - leg.received_at,
                took_s=time.monotonic() - started,
            )
            frames: Frames = ()
            if output.new_prompt_logprobs_tensors is not None:
                if leg.num_kept_outputs:  # their rows come last
                    output.new_prompt_logprobs_tensors = type(output.new_prompt_logprobs_tensors)(
                        *(rows[: -leg.num_kept_outputs] for rows in output.new_prompt_logprobs_tensors[:3])
                    )
                output.new_token_ids, output.new_logprobs, output.finish_reason = [], None, None
                output.kv_transfer_params = None
                frames = self.engine.pack(output)
            self._post(done, frames)
        for request_id in [one for one in self._pushing if not self.engine.holds(one)]:
            self._pushing.discard(request_id)
            self._post(Pushed(request_id=request_id), ())
        return executed

    def poll_s(self, num_idle_steps: int) -> float | None:
        """A push in flight is looked after ever less often; patches announce themselves."""
        if not self._pushing:
            return _PATCH_POLL_S
        first, last = _PUSH_POLL_S
        return float(min(first * 1.5**num_idle_steps, last)) if num_idle_steps < 32 else last

    def held(self) -> dict[str, int]:
        """As `Stage`, and the requests that this stage knows."""
        return super().held() | {"requests": len(self._legs) + len(self._pushing)}

    def reset(self) -> None:
        """Drops all requests."""
        self.engine.abort([*self._legs, *self._pushing])
        self._legs.clear()
        self._pushing.clear()

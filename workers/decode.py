"""The decode stage: pushed KV in, tokens out. Lives in a decode worker's engine thread."""

from __future__ import annotations

from typing import TYPE_CHECKING

from epd.errors import ErrorCode
from epd.messages import (
    Abort,
    Decode,
    LegFailed,
    LegOutput,
    Message,
    NeedPatches,
    PatchReady,
    Prefilled,
    Ready,
    Released,
    Stage,
    StepOutputs,
)
from workers.leaks import LeakWatch
from workers.reading import ReadingStage
from workers.resources import blocks
from workers.stage import Frames

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput

_ARRIVING_POLL_S = 0.0002
_WAIT_POLL_S = 0.05
_NUM_FAST_POLLS = 200
# PREFILLED carries the token and is sent when the KV is; if the broker has lost it, it has lost more than that.
_TOKEN_WAIT_S = 5.0


class DecodeStage(ReadingStage):
    """Registers each request for its KV at once, and decodes it when the KV has come.

    Nothing in this process signals that KV has arrived. PREFILLED says that it is on its way; until then the engine is
    polled only now and then.
    """

    stage = Stage.DECODE

    def start(self) -> None:
        """Builds the engine."""
        super().start()
        self._requests: dict[str, int] = {}  # and how many tokens of the answer there are
        self._arriving: set[str] = set()
        self._lacking: dict[str, float] = {}  # since when they have had their KV but not their token
        self._leaks = LeakWatch()

    def handle(self, message: Message, frames: Frames) -> None:
        """Handles DECODE, PREFILLED, READY and ABORT."""
        match message:
            case Decode() if self.is_new(message.leg_id):
                try:
                    self.engine.add_decode(
                        message.leg_id, frames, message.prefill, message.output_token_ids, message.awaits_token
                    )
                except Exception as error:
                    text = f"{type(error).__name__}: {error}"[:500]
                    self._post(LegFailed(leg_id=message.leg_id, code=ErrorCode.ENGINE_FAILED, message=text), ())
                else:
                    self._requests[message.leg_id] = len(message.output_token_ids)
            case Prefilled():
                if message.leg_id in self._requests:
                    self._arriving.add(message.leg_id)
                    if self.engine.give_token(message.leg_id, message.token_ids):
                        self._requests[message.leg_id] += len(message.token_ids)
            case Ready() if message.leg_id in self._requests:
                self.engine.connector.expect(message.leg_id, [patch.patch_hash for patch in message.ready])
                self._ready(message.leg_id, message.ready)
            case Abort():
                self.engine.abort([message.leg_id])
                self._forget(message.leg_id)
                self._post(Released(leg_id=message.leg_id), ())

    def _stale(self, request_id: str, patch: PatchReady, reason: str) -> None:
        if request_id in self._requests:
            text = f"preempted, and patch {patch.patch_hash[:8]} cannot be read again: {reason}"
            self._fail(request_id, ErrorCode.PREEMPTED, text)

    def step(self) -> bool:
        """Decodes one token of every request that has its KV."""
        started = self.clock()
        self._look_at_slots()
        outputs, executed = self.engine.step()
        told: list[LegOutput] = []
        frames: list[bytes] = []
        for output in outputs:
            if output.request_id in self._requests and (one := self._take(output, frames)) is not None:
                told.append(one)
        if told:
            self._post(StepOutputs(outputs=told), frames)
        if executed:
            self.did(self.clock() - started, sum(len(one.token_ids) for one in told))
        if not executed:
            self._ask_for_patches()
        self._give_up_waiting()
        return executed

    def _take(self, output: EngineCoreOutput, frames: list[bytes]) -> LegOutput | None:
        """What to report of an engine output; its opaque frames are appended to `frames`."""
        leg_id = output.request_id
        self._arriving.discard(leg_id)
        output.kv_transfer_params = None
        if str(output.finish_reason) == "error":  # its KV was refused (`workers.push_connector`)
            self._forget(leg_id)
            self._post(LegFailed(leg_id=leg_id, code=ErrorCode.WORKER_LOST, message="its KV was not pushed"), ())
            return None
        token_ids, stats = list(output.new_token_ids), output.prefill_stats
        packed, before = self.engine.pack(output), self._requests[leg_id]
        frames += packed
        if output.finished:
            self._forget(leg_id)
        else:
            self._requests[leg_id] = before + len(token_ids)
        return LegOutput(
            leg_id=leg_id,
            token_ids=token_ids,
            num_before=before,
            num_pushed_tokens=stats.num_external_cached_tokens if stats else -1,
            finish_reason=str(output.finish_reason) if output.finished else "",
            num_frames=len(packed),
        )

    def _give_up_waiting(self) -> None:
        """Sends requests elsewhere whose token does not come."""
        now = self.clock()
        self._lacking = {one: self._lacking.get(one, now) for one in self.engine.lacking_token()}
        for request_id, since in self._lacking.items():
            if now - since > _TOKEN_WAIT_S:
                self._fail(request_id, ErrorCode.WORKER_LOST, "its KV was pushed, but its first token did not come")

    def _ask_for_patches(self) -> None:
        for request_id, patch_hashes in self.engine.connector.take_needed().items():
            if request_id in self._requests:
                self.engine.connector.expect(request_id, patch_hashes)
                self._post(NeedPatches(leg_id=request_id, patch_hashes=patch_hashes), ())

    def _fail(self, request_id: str, code: ErrorCode, text: str) -> None:
        self.engine.abort([request_id])
        self._forget(request_id)
        self._post(LegFailed(leg_id=request_id, code=code, message=text), ())

    def _forget(self, request_id: str) -> None:
        self._requests.pop(request_id, None)
        self._arriving.discard(request_id)
        self.engine.connector.forget(request_id)

    def poll_s(self, num_idle_steps: int) -> float | None:
        """KV that is on its way is polled for all the time, other KV only now and then."""
        if self.engine.kv_arrived():
            return 0.0
        if self._arriving and num_idle_steps < _NUM_FAST_POLLS:
            return _ARRIVING_POLL_S
        slots_s = super().poll_s(num_idle_steps)
        return _WAIT_POLL_S if slots_s is None else slots_s

    def held(self) -> dict[str, int]:
        """As in `StageRunner`, plus the requests that this stage knows."""
        return super().held() | {"requests": len(self._requests)}

    def leak(self, now: float) -> str:
        """Looks for KV blocks that no request holds."""
        return self._leaks.observe(now, **blocks(self.engine, self._requests))

    def reset(self) -> None:
        """Drops all requests."""
        self.engine.abort(list(self._requests))
        self._requests.clear()
        self._arriving.clear()

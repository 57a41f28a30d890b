"""The decode stage: pushed KV in, tokens out. Lives in a decode worker's engine thread."""

from __future__ import annotations

from cache.slot import StaleSlotError
from epd.messages import Abort, Decode, Failed, Finished, Message, NeedPatches, Prefilled, Ready, Released, Role, Tokens
from workers.stage import Frames, Stage

_ARRIVING_POLL_S = 0.0002
_WAIT_POLL_S = 0.05
_NUM_FAST_POLLS = 200


class DecodeStage(Stage):
    """Registers each request for its KV at once, and decodes it when it has come.

    The KV arrives without an event in this process; PREFILLED says that it is on its way, and until then the engine is
    looked after only now and then.
    """

    role = Role.DECODE

    def start(self) -> None:
        """Builds the engine."""
        super().start()
        self._requests: dict[str, int] = {}  # the tokens of its answer so far, by leg
        self._arriving: set[str] = set()

    def handle(self, message: Message, frames: Frames) -> None:
        """Takes in DECODE, PREFILLED, READY and ABORT."""
        match message:
            case Decode() if message.request_id not in self._requests:
                try:
                    self.engine.add_decode(message.request_id, frames, message.prefill, message.output_token_ids)
                except Exception as error:
                    text = f"{type(error).__name__}: {error}"[:500]
                    self._post(Failed(request_id=message.request_id, code="engine_failed", message=text), ())
                else:
                    self._requests[message.request_id] = len(message.output_token_ids)
            case Prefilled():
                if message.request_id in self._requests:
                    self._arriving.add(message.request_id)
            case Ready():
                self._ready(message)
            case Abort():
                self.engine.abort([message.request_id])
                self._forget(message.request_id)
                self._post(Released(request_id=message.request_id), ())

    def _ready(self, message: Ready) -> None:
        self.engine.connector.expect(message.request_id, [patch.patch_hash for patch in message.ready])
        for patch in message.ready:
            try:
                self.engine.connector.patch_ready(patch.patch_hash, patch.slot)
            except StaleSlotError as error:
                text = f"preempted, and patch {patch.patch_hash[:8]} cannot be read again: {error}"
                self._fail(message.request_id, "preempted", text)
                return

    def step(self) -> bool:
        """Decodes one token of every request that has its KV."""
        outputs, executed = self.engine.step()
        for output in outputs:
            request_id = output.request_id
            if request_id not in self._requests:
                continue
            self._arriving.discard(request_id)
            output.kv_transfer_params = None
            token_ids, before = list(output.new_token_ids), self._requests[request_id]
            self._requests[request_id] += len(token_ids)
            frames = self.engine.pack(output)
            if output.finished:
                self._forget(request_id)
                reason = str(output.finish_reason)
                finished = Finished(request_id=request_id, token_ids=token_ids, finish_reason=reason, num_before=before)
                self._post(finished, frames)
            else:
                self._post(Tokens(request_id=request_id, token_ids=token_ids, num_before=before), frames)
        if not executed:
            self._ask_for_patches()
        return executed

    def _ask_for_patches(self) -> None:
        for request_id, patch_hashes in self.engine.connector.take_needed().items():
            if request_id in self._requests:
                self.engine.connector.expect(request_id, patch_hashes)
                self._post(NeedPatches(request_id=request_id, patch_hashes=patch_hashes), ())

    def _fail(self, request_id: str, code: str, text: str) -> None:
        self.engine.abort([request_id])
        self._forget(request_id)
        self._post(Failed(request_id=request_id, code=code, message=text), ())

    def _forget(self, request_id: str) -> None:
        self._requests.pop(request_id, None)
        self._arriving.discard(request_id)
        self.engine.connector.forget(request_id)

    def poll_s(self, num_idle_steps: int) -> float | None:
        """KV that is on its way is looked for all the time; KV that is not, now and then."""
        if self.engine.kv_arrived():
            return 0.0
        if self._arriving and num_idle_steps < _NUM_FAST_POLLS:
            return _ARRIVING_POLL_S
        return _WAIT_POLL_S

    def held(self) -> dict[str, int]:
        """As `Stage`, and the requests that this stage knows."""
        return super().held() | {"requests": len(self._requests)}

    def reset(self) -> None:
        """Drops all requests."""
        self.engine.abort(list(self._requests))
        self._requests.clear()
        self._arriving.clear()

"""What the pipeline has given for a request, as vLLM's engine would have said it.

Lives in the endpoint process; pure. A part of the engine client, written against vLLM 0.32 (`vllm.v1.engine`); the
workers' side is `workers.outputs`.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm.v1.engine import EngineCoreOutput, FinishReason
from vllm.v1.serial_utils import MsgpackDecoder

from epd.messages import RequestOutput

_REASONS = {str(reason): reason for reason in FinishReason}
# Roughly how much memory a plain output takes until it is read.
_PLAIN_BYTES, _TOKEN_BYTES = 64, 8


class OutputReader:
    """Reads engine outputs."""

    def __init__(self) -> None:
        self._decoder = MsgpackDecoder(EngineCoreOutput)

    def read(self, message: RequestOutput, frames: Sequence[bytes]) -> EngineCoreOutput:
        """An engine output from its opaque frames; without frames, from token ids and finish reason alone.

        Raises:
            ValueError, KeyError: it cannot be read.
        """
        if frames:
            output: EngineCoreOutput = self._decoder.decode(frames)
            return output
        reason = _REASONS[message.finish_reason] if message.finish_reason else None
        return EngineCoreOutput(message.request_id, list(message.token_ids), finish_reason=reason)


def num_bytes(message: RequestOutput, frames: Sequence[bytes]) -> int:
    """Roughly how much memory an output takes until it is read."""
    return sum(map(len, frames)) if frames else _PLAIN_BYTES + _TOKEN_BYTES * len(message.token_ids)

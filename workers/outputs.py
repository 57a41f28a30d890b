"""Engine outputs as opaque frames; as none if token ids and finish reason say everything.

Lives in a worker's engine thread; pure. Most outputs are one token and nothing else, many times a second: these need no
frame, no copy and no decoder. Written against vLLM 0.32 (`vllm.v1.engine`); the endpoint's side is
`epd.endpoint.engine.flights`.
"""

from __future__ import annotations

from vllm.v1.engine import EngineCoreOutput
from vllm.v1.serial_utils import MsgpackEncoder

_SAID_BESIDE = ("request_id", "new_token_ids", "finish_reason")
_REST = tuple(
    (name, default)
    for name, default in zip(
        EngineCoreOutput.__struct_fields__[
            len(EngineCoreOutput.__struct_fields__) - len(EngineCoreOutput.__struct_defaults__) :
        ],
        EngineCoreOutput.__struct_defaults__,
        strict=True,
    )
    if name not in _SAID_BESIDE
)


class OutputPacker:
    """Packs the outputs of one engine."""

    def __init__(self) -> None:
        self._encoder = MsgpackEncoder()

    def pack(self, output: EngineCoreOutput) -> list[bytes]:
        """An engine output as opaque frames; none if it has only token ids and a finish reason."""
        if is_plain(output):
            return []
        return [bytes(frame) for frame in self._encoder.encode(output)]


def is_plain(output: EngineCoreOutput) -> bool:
    """Whether token ids and finish reason are all that an output says."""
    return all(getattr(output, name) is default for name, default in _REST)

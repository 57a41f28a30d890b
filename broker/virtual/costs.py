"""How long things take in virtual time. Pure.

Anything with these four methods is a cost model; `Costs` is linear in what there is to do.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol


class CostModel(Protocol):
    """How long an engine step takes, and a transfer of KV, in seconds."""

    def encode_s(self, num_patches: int, num_rows: int) -> float:
        """The time for a batch of patches that give this many embedding rows."""

    def prefill_s(self, num_tokens: int, num_context_tokens: int) -> float:
        """The time for a step that computes this many tokens of prompts, after those that were computed before."""

    def decode_s(self, num_sequences: int, num_context_tokens: int) -> float:
        """The time for a step that gives each sequence a token; together they have this many tokens."""

    def push_s(self, num_tokens: int) -> float:
        """The time to push the KV of this many tokens from a prefill to a decode worker."""


@dataclasses.dataclass(frozen=True, slots=True)
class Costs:
    """Seconds for each step and for each thing in it; all 0 by default, so that everything happens at once."""

    encode_step_s: float = 0.0
    encode_patch_s: float = 0.0
    encode_row_s: float = 0.0
    prefill_step_s: float = 0.0
    prefill_token_s: float = 0.0
    decode_step_s: float = 0.0
    decode_sequence_s: float = 0.0
    decode_context_token_s: float = 0.0
    push_step_s: float = 0.0
    push_token_s: float = 0.0

    def encode_s(self, num_patches: int, num_rows: int) -> float:
        """See `CostModel`, as for those below."""
        return self.encode_step_s + self.encode_patch_s * num_patches + self.encode_row_s * num_rows

    def prefill_s(self, num_tokens: int, num_context_tokens: int) -> float:
        """What was computed before costs nothing."""
        return self.prefill_step_s + self.prefill_token_s * num_tokens

    def decode_s(self, num_sequences: int, num_context_tokens: int) -> float:
        """A step, its sequences, and what they look back at."""
        by_sequence = self.decode_sequence_s * num_sequences
        return self.decode_step_s + by_sequence + self.decode_context_token_s * num_context_tokens

    def push_s(self, num_tokens: int) -> float:
        """By the tokens."""
        return self.push_step_s + self.push_token_s * num_tokens


FREE = Costs()

"""LoRA adapters of an engine: what they are called there. Pure.

Lives in a worker process, in its engine thread. Written against vLLM 0.32 (`vllm.lora`).

An endpoint numbers its adapters as it gets to know them, so the same number means another adapter at another endpoint,
or after a restart. vLLM's engine tells adapters apart by that number, and in a batch by their name. So each engine
counts for itself, by name and path, and gives each adapter a name of its own.
"""

from __future__ import annotations

from vllm.lora.request import LoRARequest


class Adapters:
    """The adapters that one engine has been asked for, numbered from 1 in the order of their first request."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[str, str], int] = {}

    def own(self, asked: LoRARequest) -> LoRARequest:
        """The same adapter under this engine's number and a name that no other adapter has here."""
        number = self._numbers.setdefault((asked.lora_name, asked.lora_path), len(self._numbers) + 1)
        return LoRARequest(
            lora_name=f"{asked.lora_name}@{asked.lora_path}",
            lora_int_id=number,
            lora_path=asked.lora_path,
            is_3d_lora_weight=asked.is_3d_lora_weight,
        )

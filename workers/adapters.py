"""LoRA adapters of a stage's engine: their names there, and when they are read.

Lives in a worker process, in its engine thread; a part of `workers.engine`, written against vLLM 0.32 (`vllm.lora`).

Endpoints number adapters in the order in which they learn of them, so one number may mean different adapters at two
endpoints, or after a restart. vLLM's engine tells adapters apart by that number, and in a batch by their name. So each
engine counts for itself, by name and path, and gives each adapter its own name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from vllm.lora.ops.torch_ops import lora_ops
from vllm.lora.punica_wrapper import punica_cpu
from vllm.lora.request import LoRARequest
from vllm.v1.engine import EngineCoreRequest

from epd.config import ConfigError

_EXPANDS = ("bgmv_expand", "bgmv_expand_slice")


class Loads(Protocol):
    """What an engine core has for adapters."""

    def list_loras(self) -> set[int]:
        """The numbers of the loaded adapters."""

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Reads an adapter from its path; raises if it cannot be served."""


def check_options(options: Mapping[str, Any]) -> None:
    """Refuses adapters of the vision tower: embeddings are named, cached and shared without regard to adapters.

    Raises:
        ConfigError: the options ask for them.
    """
    if options.get("enable_tower_connector_lora"):
        raise ConfigError("enable_tower_connector_lora: only the language model can have adapters")


class Adapters:
    """The adapters that one engine has been asked for, numbered from 1 in the order of their first request."""

    def __init__(self, core: Loads) -> None:
        self._core = core
        self._numbers: dict[tuple[str, str], int] = {}
        spare_base_requests()

    def prepare(self, request: EngineCoreRequest) -> EngineCoreRequest:
        """Gives the request's adapter this engine's name and number, and reads it if it is not loaded.

        It is read here because an adapter that turns out to be unreadable during a step ends the whole engine.

        Raises:
            Exception: vLLM's own, of many kinds: the adapter cannot be read or served, or adapters are not enabled.
        """
        if request.lora_request is not None:
            request.lora_request = self.own(request.lora_request)
            if request.lora_request.lora_int_id not in self._core.list_loras():
                self._core.add_lora(request.lora_request)
        return request

    def own(self, asked: LoRARequest) -> LoRARequest:
        """The same adapter under this engine's number and a name that no other adapter has here."""
        number = self._numbers.setdefault((asked.lora_name, asked.lora_path), len(self._numbers) + 1)
        return LoRARequest(
            lora_name=f"{asked.lora_name}@{asked.lora_path}",
            lora_int_id=number,
            lora_path=asked.lora_path,
            is_3d_lora_weight=asked.is_3d_lora_weight,
        )


def spare_base_requests() -> None:
    """On CPUs, keeps adapters away from requests that have none; may be called more than once.

    In a batch with adapters, vLLM gives the rows of other requests the index -1, which its CPU operations take for the
    last adapter. What adapters add goes through the functions that are replaced here.
    """
    for module in (lora_ops, punica_cpu):
        for name in _EXPANDS:
            expand = getattr(module, name)
            if not hasattr(expand, "spares"):
                setattr(module, name, _sparing(expand))


def _sparing(expand: Callable[..., None]) -> Callable[..., None]:
    def sparing(
        inputs: torch.Tensor,
        weights: torch.Tensor,
        output: torch.Tensor,
        indices: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        expand(inputs.masked_fill((indices < 0).unsqueeze(1), 0), weights, output, indices, *args, **kwargs)

    sparing.spares = expand  # type: ignore[attr-defined]
    return sparing

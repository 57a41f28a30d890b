"""LoRA adapters of a stage's engine: what they are called there, and when they are read.

Lives in a worker process, in its engine thread; a part of `workers.engine`, written against vLLM 0.32 (`vllm.lora`).

An endpoint numbers its adapters as it gets to know them, so the same number means another adapter at another endpoint,
or after a restart. vLLM's engine tells adapters apart by that number, and in a batch by their name. So each engine
counts for itself, by name and path, and gives each adapter a name of its own.
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
        """The numbers of those that are loaded."""

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Reads one from its path; raises where it cannot be served."""


def check_options(options: Mapping[str, Any]) -> None:
    """Refuses adapters of the vision tower: embeddings are named, cached and shared without regard to adapters.

    Raises:
        ConfigError: they are asked for.
    """
    if options.get("enable_tower_connector_lora"):
        raise ConfigError("enable_tower_connector_lora: adapters can only be those of the language model")


class Adapters:
    """The adapters that one engine has been asked for, numbered from 1 in the order of their first request."""

    def __init__(self, core: Loads) -> None:
        self._core = core
        self._numbers: dict[tuple[str, str], int] = {}
        spare_base_requests()

    def prepare(self, request: EngineCoreRequest) -> EngineCoreRequest:
        """Gives the request's adapter this engine's name and number, and reads it if it is not loaded.

        It is read here, since an adapter that cannot be read during a step ends the whole engine.

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
    """Keeps adapters on CPUs off the requests that have none; may be called again.

    In a batch with adapters, vLLM gives the rows of the other requests the index -1; its CPU operations take that for
    the last adapter. What adapters add goes through the functions that are replaced here.
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

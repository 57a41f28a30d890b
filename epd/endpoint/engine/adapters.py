"""LoRA adapters at the endpoint: checked before they are offered; the engines load them by path.

Lives in the endpoint process. A part of the engine client, written against vLLM 0.32 (`vllm.lora`,
`vllm.entrypoints.openai.models.serving`).
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from vllm.config import VllmConfig
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest

from epd.config import ConfigError

_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")


class AdapterChecks:
    """What vLLM's server asks its engine core when an adapter is to be offered; here there is no engine.

    The configuration of the adapter is checked here; its weights are read by each prefill and decode worker when the
    first request for it comes, and a request whose adapter cannot be read fails there by itself.
    """

    _vllm_config: VllmConfig

    async def add_lora_async(self, lora_request: LoRARequest) -> bool:
        """Whether the adapter may be offered.

        Raises:
            LoRAAdapterNotFoundError: there is no such folder here, or nothing in it.
            ValueError: it cannot be served with this configuration; the text says why.
        """
        if self._vllm_config.lora_config is None:
            raise ValueError("adapters need the engine option enable_lora = true")
        if lora_request.load_inplace:
            raise ValueError("workers keep an adapter by its name and path: load changed weights under another name")
        await asyncio.to_thread(_check_files, lora_request, self._vllm_config)
        return True

    async def remove_lora_async(self, _lora_id: int) -> bool:
        """True: workers drop adapters that nobody uses when they need the room."""
        return True


def _check_files(adapter: LoRARequest, config: VllmConfig) -> None:
    folder = Path(adapter.lora_path).expanduser()
    if not (folder / "adapter_config.json").is_file() or not any((folder / name).is_file() for name in _WEIGHTS):
        raise LoRAAdapterNotFoundError(adapter.lora_name, adapter.lora_path)
    helper = PEFTHelper.from_local_dir(str(folder), config.model_config.max_model_len)
    helper.validate_legal(config.lora_config)


def check_options(config: VllmConfig) -> None:
    """Refuses adapters of the vision tower: embeddings are named, cached and shared without regard to adapters.

    Raises:
        ConfigError: the options ask for them.
    """
    if config.lora_config is not None and config.lora_config.enable_tower_connector_lora:
        raise ConfigError("enable_tower_connector_lora: only the language model can have adapters")

"""Small random LoRA adapters for the built-in model, in the files that PEFT would write."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from epd.builtin import model_path

MODULES = ("q_proj", "v_proj")


def write_adapter(folder: Path, seed: int, rank: int = 8, **changes: Any) -> Path:
    """An adapter of the language model's attention, large enough to change every answer; `changes` are to its config.

    Returns:
        The folder.
    """
    text = json.loads((model_path() / "config.json").read_text())["text_config"]
    width, generator = text["hidden_size"], torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(text["num_hidden_layers"]):
        for module in MODULES:
            name = f"base_model.model.model.text_model.layers.{layer}.self_attn.{module}"
            for part, shape in (("lora_A", (rank, width)), ("lora_B", (width, rank))):
                tensors[f"{name}.{part}.weight"] = (torch.randn(shape, generator=generator) * 0.3).bfloat16()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": list(MODULES)} | changes))
    return folder

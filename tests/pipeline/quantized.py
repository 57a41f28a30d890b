"""The built-in model with its language model in 8 bits, in the format of compressed-tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from epd.builtin import model_path

SCHEME = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
    "ignore": ["lm_head", "re:.*vision_model.*", "re:.*connector.*"],
}


def write_quantized(folder: Path) -> Path:
    """Writes the model: each row of a language matrix as int8 with a scale.

    Returns:
        The folder.
    """
    shutil.copytree(model_path(), folder)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if ".text_model.layers." in name and name.endswith("proj.weight"):
            scale = (tensor.float().abs().amax(1, keepdim=True) / 127).clamp(min=1e-8)
            tensors[name] = (tensor.float() / scale).round().clamp(-128, 127).to(torch.int8)
            tensors[f"{name}_scale"] = scale.to(tensor.dtype)
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": SCHEME}))
    return folder

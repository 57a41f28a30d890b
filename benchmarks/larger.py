"""A model with random weights whose language part is as large as a real one, for what a toy cannot show.

It is the built-in model with another config: its tokenizer, processor, chat template and small vision tower, and a
language model with the shapes of SmolVLM-256M's. What it says means nothing; what it computes takes as long.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from epd.builtin import model_path

# The language part of SmolVLM-256M but for its vocabulary; the connector's output is as wide as this one's input.
TEXT: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "initializer_range": 0.02,
}


def make(folder: Path) -> int:
    """Writes the model into `folder` (about 0.2 GB); returns how many parameters it has."""
    import torch
    import transformers

    shutil.copytree(model_path(), folder, ignore=shutil.ignore_patterns("*.safetensors", "*.md"))
    file = folder / "config.json"
    tree = json.loads(file.read_text())
    tree["text_config"] |= TEXT
    file.write_text(json.dumps(tree))
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(folder)
    model = transformers.Idefics3ForConditionalGeneration(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())

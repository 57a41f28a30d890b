"""What the makers of tiny random models share: sizes, a tokenizer, a chat template, and saving.

Each model has about 0.2 million parameters. The towers' weights are scaled up, so that what is in a picture or a sound
shows in the embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 8,
}
TEXT: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "tie_word_embeddings": False,
}
TOWER_SCALE = 5.0
_TOWERS = ("vision", "visual", "audio", "projector", "vpm", "merger", "connector")


def template(marks: Mapping[str, str]) -> str:
    """A chat template that puts the mark of a modality where an item of it is."""
    cases = "".join("{% elif c['type'] == '" + name + "' %}" + mark for name, mark in marks.items())
    part = "{% if c['type'] == 'text' %} {{ c['text'] }}" + cases + "{% endif %}"
    return "{% for m in messages %}User:{% for c in m['content'] %}" + part + "{% endfor %}{% endfor %}"


def tokenizer(
    special: Sequence[str], marks: Mapping[str, str], named: Mapping[str, str] | None = None
) -> transformers.PreTrainedTokenizerFast:
    """A byte-level tokenizer of a few hundred tokens.

    Args:
        special: its further special tokens.
        marks: modality -> what stands for an item in the chat template.
        named: attribute -> one of `special`, for processors that ask the tokenizer by name.
    """
    names = ["<unk>", "<s>", "</s>", "<pad>", *special]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max(400, len(names) + 300),
        special_tokens=names,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["User: What is in the picture? 0 1 2 3"] * 9, trainer)
    roles = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), names, strict=False))
    more: dict[str, Any] = {"extra_special_tokens": dict(named)} if named else {}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        additional_special_tokens=list(special),
        chat_template=template(marks),
        **roles,
        **more,
    )


def save(
    model: Any, processors: Sequence[Any], words: Any, folder: Path, renamed: Mapping[str, str] | None = None
) -> None:
    """Scales the towers up, and writes the model, its processors and its tokenizer.

    Args:
        model: the random model.
        processors: each is saved into the folder, in this order.
        words: the tokenizer.
        folder: where to.
        renamed: prefix -> prefix of weights that transformers 5 saves under names which vLLM 0.32 does not map.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and any(tower in name for tower in _TOWERS):
                parameter.mul_(TOWER_SCALE)
    model.to(torch.bfloat16).save_pretrained(folder)
    for processor in processors:
        processor.save_pretrained(folder)
    words.save_pretrained(folder)
    if renamed:
        file = folder / "model.safetensors"
        tensors = {_renamed(name, renamed): tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    for before, after in prefixes.items():
        if name.startswith(before):
            return after + name.removeprefix(before)
    return name

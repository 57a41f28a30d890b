"""Tiny random models that listen, made on the spot by `python -m tests.models.tiny NAME FOLDER`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.models.tiny import TEXT, TOWER_SCALE, tokenizer

MEL_BINS = 32


def qwen2_audio(folder: Path) -> None:
    """Qwen2-Audio: a clip of at most 30 s is one item."""
    words = _tokenizer("<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>")
    config = transformers.Qwen2AudioConfig(
        audio_token_index=words.convert_tokens_to_ids("<|AUDIO|>"),
        audio_config={
            "num_mel_bins": MEL_BINS,
            "d_model": 64,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 128,
            "max_source_positions": 1500,
        },
        text_config=TEXT | {"model_type": "qwen2", "vocab_size": len(words)},
        tie_word_embeddings=False,
    )
    processor = transformers.Qwen2AudioProcessor(_features(), words, chat_template=words.chat_template)
    _save(transformers.Qwen2AudioForConditionalGeneration(config), processor, words, folder)


def audioflamingo3(folder: Path) -> None:
    """Audio Flamingo 3: a clip is as many windows of 30 s as it needs."""
    words = _tokenizer("<sound>")
    config = transformers.AudioFlamingo3Config(
        audio_token_id=words.convert_tokens_to_ids("<sound>"),
        audio_config={
            "num_mel_bins": MEL_BINS,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "max_source_positions": 1500,
        },
        text_config=TEXT | {"model_type": "qwen2", "vocab_size": len(words)},
        tie_word_embeddings=False,
    )
    processor = transformers.AudioFlamingo3Processor(
        _features(), words, chat_template=words.chat_template, max_audio_len=90
    )
    _save(transformers.AudioFlamingo3ForConditionalGeneration(config), processor, words, folder)


def _features() -> Any:
    """Whisper's: 3000 frames of `MEL_BINS` for 30 s."""
    return transformers.WhisperFeatureExtractor(feature_size=MEL_BINS, chunk_length=30)


def _tokenizer(token: str, before: str = "", after: str = "") -> Any:
    words = tokenizer([each for each in (token, before, after) if each])
    audio = f"{{% if c['type'] == 'audio' %}}{before}{token}{after}"
    part = audio + "{% else %} {{ c['text'] }}{% endif %}"
    words.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{% for c in m['content'] %}" + part + "{% endfor %}{% endfor %}"
    )
    return words


def _save(model: Any, processor: Any, words: Any, folder: Path) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and ("audio_tower" in name or "projector" in name):
                parameter.mul_(TOWER_SCALE)
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    words.save_pretrained(folder)
    # transformers 5 saves these names in a way that vLLM 0.32 does not map.
    file = folder / "model.safetensors"
    tensors = {
        name.replace("language_model.model.model.", "language_model.model."): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})


FAMILIES = {"qwen2_audio": qwen2_audio, "audioflamingo3": audioflamingo3}

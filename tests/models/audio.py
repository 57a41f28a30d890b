"""Tiny models that hear: Qwen2-Audio (one window), Audio Flamingo 3 and GLM-ASR (windows of 30 seconds)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from tests.models.making import TEXT, save, tokenizer

MEL_BINS = 32
# transformers 5 nests the language model once more than vLLM 0.32 maps.
_NAMES = {"language_model.model.model.": "language_model.model."}


def _features() -> Any:
    return transformers.WhisperFeatureExtractor(feature_size=MEL_BINS, chunk_length=30)


def qwen2_audio(folder: Path) -> None:
    """Qwen2-Audio: what is longer than 30 seconds is cut off."""
    words = tokenizer(["<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"], {"audio": "<|audio_bos|><|AUDIO|><|audio_eos|>"})
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
    save(transformers.Qwen2AudioForConditionalGeneration(config), [processor], words, folder, _NAMES)


def audioflamingo3(folder: Path) -> None:
    """Audio Flamingo 3: windows of 30 seconds, 750 tokens each and fewer for the last."""
    words = tokenizer(["<sound>"], {"audio": "<sound>"})
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
        _features(), words, max_audio_len=90, chat_template=words.chat_template
    )
    save(transformers.AudioFlamingo3ForConditionalGeneration(config), [processor], words, folder, _NAMES)


def glmasr(folder: Path) -> None:
    """GLM-ASR: windows of 30 seconds, 375 tokens each and fewer for the last."""
    words = tokenizer(["<|pad|>"], {"audio": "<|pad|>"})
    config = transformers.GlmAsrConfig(
        audio_token_id=words.convert_tokens_to_ids("<|pad|>"),
        audio_config={
            "num_mel_bins": MEL_BINS,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 512,
            "max_position_embeddings": 1500,
        },
        text_config=TEXT | {"model_type": "llama", "vocab_size": len(words)},
        tie_word_embeddings=False,
    )
    processor = transformers.GlmAsrProcessor(_features(), words, max_audio_len=90, chat_template=words.chat_template)
    save(transformers.GlmAsrForConditionalGeneration(config), [processor], words, folder, _NAMES)

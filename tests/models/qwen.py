"""Tiny random models with multimodal rotary positions (M-RoPE), made on the spot.

Each has about 0.2 million parameters. Besides the towers' weights those of the language model's queries and keys are
scaled up, so that it shows in the log-probabilities where in the prompt an embedding is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from tests.models.making import TEXT, TOWER_SCALE, tokenizer

POSITION_SCALE = 8.0
HEAD_SCALE = 20.0
SPECIAL = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
VISION: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_heads": 2}
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %} {{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def qwen2_vl(folder: Path) -> None:
    """Qwen2-VL: a video is one run of embeddings, a temporal grid after another."""
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 128, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    _save(folder, transformers.Qwen2VLConfig, transformers.Qwen2VLForConditionalGeneration, vision)


def qwen2_5_vl(folder: Path) -> None:
    """Qwen2.5-VL: attention in windows, and positions in time that follow the seconds between temporal grids."""
    vision = VISION | {"depth": 2, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
    vision |= {"out_hidden_size": 128, "tokens_per_second": 2}
    _save(folder, transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration, vision)


def qwen3_vl(folder: Path) -> None:
    """Qwen3-VL: DeepStack (embeddings for three layers in one), and text between the temporal grids of a video."""
    vision = VISION | {"depth": 3, "patch_size": 16, "out_hidden_size": 128, "num_position_embeddings": 64}
    vision |= {"deepstack_visual_indexes": [0, 1]}
    rope = {"mrope_section": [8, 4, 4], "mrope_interleaved": True}
    _save(folder, transformers.Qwen3VLConfig, transformers.Qwen3VLForConditionalGeneration, vision, rope)


def paddleocr_vl(folder: Path) -> None:
    """PaddleOCR-VL: images only, with a grid each."""
    from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import PaddleOCRVLImageProcessorPil
    from transformers.models.paddleocr_vl.processing_paddleocr_vl import PaddleOCRVLProcessor

    names = ["<|IMAGE_START|>", "<|IMAGE_END|>", "<|IMAGE_PLACEHOLDER|>", "<|VIDEO_PLACEHOLDER|>"]
    words = tokenizer(names, {})
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words.backend_tokenizer,
        extra_special_tokens={"image_token": "<|IMAGE_PLACEHOLDER|>"},
        **{name: getattr(words, name) for name in ("unk_token", "bos_token", "eos_token", "pad_token")},
    )
    template = TEMPLATE
    for before, after in zip(SPECIAL, names, strict=True):
        template = template.replace(before, after)
    roles = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    vision = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 112, "patch_size": 14}
    config = transformers.PaddleOCRVLConfig(
        text_config=_text(words, {}),
        vision_config=VISION | vision,
        **dict(zip(roles, words.convert_tokens_to_ids(names), strict=True)),
        tie_word_embeddings=False,
    )
    model = transformers.PaddleOCRVLForConditionalGeneration(config)
    _scale(model).save_pretrained(folder)
    images = PaddleOCRVLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 64})
    PaddleOCRVLProcessor(images, words, chat_template=template).save_pretrained(folder)
    words.chat_template = template
    words.save_pretrained(folder)


def _text(words: Any, rope: dict[str, Any]) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]} | rope
    return TEXT | {"head_dim": 32, "vocab_size": len(words), "rope_parameters": rope}


def _save(folder: Path, config: Any, model: Any, vision: dict[str, Any], rope: dict[str, Any] | None = None) -> None:
    words = tokenizer(SPECIAL, {})
    words.chat_template = TEMPLATE
    start, end, image, video = words.convert_tokens_to_ids(SPECIAL)
    text = _text(words, rope or {})
    made = model(
        config(
            text_config=text if rope else {key: value for key, value in text.items() if key != "head_dim"},
            vision_config=vision,
            image_token_id=image,
            video_token_id=video,
            vision_start_token_id=start,
            vision_end_token_id=end,
            tie_word_embeddings=False,
        )
    )
    _scale(made).save_pretrained(folder)
    unit = vision["patch_size"] * 2
    common = {"patch_size": vision["patch_size"], "temporal_patch_size": 2, "merge_size": 2}
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": unit**2, "longest_edge": unit**2 * 64}, **common)
    videos = (Qwen3VLVideoProcessor if rope else Qwen2VLVideoProcessor)(
        size={"shortest_edge": unit**2, "longest_edge": unit**2 * 1024}, **common
    )
    images.save_pretrained(folder)
    videos.save_pretrained(folder)
    words.save_pretrained(folder)


def _scale(model: Any) -> Any:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and ("visual" in name or "vision" in name or "projector" in name):
                parameter.mul_(TOWER_SCALE)
            elif "q_proj" in name or "k_proj" in name:
                parameter.mul_(POSITION_SCALE)
            elif "lm_head" in name:
                parameter.mul_(HEAD_SCALE)
    return model.to(torch.bfloat16)

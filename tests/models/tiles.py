"""Tiny models whose pictures are encoded tile by tile: SmolVLM, InternVL, Gemma 3, MiniCPM-V 4.6."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from tests.models.making import TEXT, VISION, save, tokenizer

# Gemma 3 makes crops only where it is told to.
GEMMA3_CROPS: dict[str, Any] = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 32,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}


def smolvlm(folder: Path) -> None:
    """SmolVLM: the tiles of a picture and an overview, a run of tokens for each."""
    from transformers.models.smolvlm import image_processing_pil_smolvlm as images
    from transformers.models.smolvlm import video_processing_smolvlm as videos

    named = {
        "image_token": "<image>",
        "fake_image_token": "<fake_token_around_image>",
        "global_image_token": "<global-img>",
        "end_of_utterance_token": "<end_of_utterance>",
    }
    rows = [f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5)]
    words = tokenizer([*named.values(), *rows], {"image": "<image>"}, named)
    config = transformers.SmolVLMConfig(
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        vision_config=VISION | {"model_type": "smolvlm_vision", "patch_size": 16},
        text_config=TEXT | {"model_type": "llama", "vocab_size": len(words)},
        pad_token_id=3,
        tie_word_embeddings=False,
    )
    size, tile = {"longest_edge": 256}, {"longest_edge": 64}
    sampling = {"fps": 1, "max_frames": 4, "video_size": tile}
    processor = transformers.SmolVLMProcessor(
        images.SmolVLMImageProcessorPil(size=size, max_image_size=tile, do_image_splitting=True),
        words,
        videos.SmolVLMVideoProcessor(
            size=size,
            max_image_size=tile,
            video_sampling=sampling,
        ),
        image_seq_len=4,
        chat_template=words.chat_template,
    )
    save(transformers.SmolVLMForConditionalGeneration(config), [processor], words, folder)


def internvl(folder: Path) -> None:
    """InternVL: tiles and a thumbnail in one run of tokens; a video's frames have a run each."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
    from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor

    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    words = tokenizer([*named.values()], {"image": "<IMG_CONTEXT>", "video": "<video>"}, named)
    config = transformers.InternVLConfig(
        image_token_id=words.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=16,
        tie_word_embeddings=False,
        vision_config=VISION | {"use_mean_pooling": False},
        text_config=TEXT | {"model_type": "qwen2", "vocab_size": len(words)},
    )
    size = {"height": 64, "width": 64}
    images = GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, min_patches=1, max_patches=6)
    videos = InternVLVideoProcessor(size=size)
    processor = transformers.InternVLProcessor(
        images, words, videos, image_seq_length=16, chat_template=words.chat_template
    )
    save(transformers.InternVLForConditionalGeneration(config), [processor, videos], words, folder)


def gemma3(folder: Path) -> None:
    """Gemma 3: a picture and its crops (pan and scan), a run of tokens for each."""
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    named = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    newlines = ["\n" * count for count in range(1, 5)]
    words = tokenizer([*named.values(), *newlines], {"image": "<start_of_image>"}, named)
    ids = words.convert_tokens_to_ids
    config = transformers.Gemma3Config(
        image_token_index=ids(named["image_token"]),
        boi_token_index=ids(named["boi_token"]),
        eoi_token_index=ids(named["eoi_token"]),
        mm_tokens_per_image=16,
        vision_config=VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
        text_config=TEXT
        | {
            "model_type": "gemma3_text",
            "vocab_size": len(words),
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 512,
            "tie_word_embeddings": True,
        },
        tie_word_embeddings=True,
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    model.model.multi_modal_projector.mm_input_projection_weight.data.normal_(0, 0.02)  # zeros otherwise
    images = Gemma3ImageProcessorPil(size={"height": 64, "width": 64}, **GEMMA3_CROPS)
    processor = transformers.Gemma3Processor(images, words, image_seq_length=16, chat_template=words.chat_template)
    save(model, [processor], words, folder, {"vision_tower.": "vision_tower.vision_model."})


def minicpmv(folder: Path) -> None:
    """MiniCPM-V 4.6: slices of different sizes; its text model has layers with a recurrent state."""
    from transformers.models.minicpmv4_6 import image_processing_pil_minicpmv4_6 as images
    from transformers.models.minicpmv4_6 import video_processing_minicpmv4_6 as videos

    named = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "image_start_token": "<image>",
        "image_end_token": "</image>",
        "slice_start_token": "<slice>",
        "slice_end_token": "</slice>",
        "image_id_start_token": "<image_id>",
        "image_id_end_token": "</image_id>",
    }
    words = tokenizer([*named.values()], {"image": "<|image_pad|>", "video": "<|video_pad|>"}, named)
    ids = words.convert_tokens_to_ids
    rope = {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
        "mrope_section": [8, 4, 4],
        "mrope_interleaved": True,
    }
    text = TEXT | {
        "model_type": "qwen3_5_text",
        "vocab_size": len(words),
        "head_dim": 32,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "rope_parameters": rope,
    }
    config = transformers.MiniCPMV4_6Config(
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        insert_layer_id=1,
        image_size=64,
        tie_word_embeddings=False,
        vision_config=VISION,
        text_config=text,
        # The kernels of its text model take bfloat16 only, and in that random logits tie: which token is chosen then
        # depends on the last bit. vLLM computes the logits in this type.
        head_dtype="float32",
    )
    sizes = {"scale_resolution": 64, "patch_size": 8}
    frames = videos.MiniCPMV4_6VideoProcessor(**sizes, max_slice_nums=1)
    processor = transformers.MiniCPMV4_6Processor(
        image_processor=images.MiniCPMV4_6ImageProcessorPil(**sizes, max_slice_nums=6),
        video_processor=frames,
        tokenizer=words,
        chat_template=words.chat_template,
    )
    save(transformers.MiniCPMV4_6ForConditionalGeneration(config), [processor, frames], words, folder)

"""Tiny LLaVA-1.5, LLaVA-OneVision and Mistral 3: their pictures are encoded whole."""

from __future__ import annotations

from pathlib import Path

import transformers

from tests.models.making import TEXT, VISION, save, tokenizer

_SIGLIP_NAMES = {"vision_tower.": "vision_tower.vision_model."}


def llava(folder: Path) -> None:
    """LLaVA-1.5: one square picture, one run of tokens."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    words = tokenizer(["<image>"], {"image": "<image>"})
    config = transformers.LlavaConfig(
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_config=VISION | {"model_type": "clip_vision_model"},
        text_config=TEXT | {"model_type": "llama", "vocab_size": len(words)},
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    processor = transformers.LlavaProcessor(
        images,
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=words.chat_template,
    )
    save(transformers.LlavaForConditionalGeneration(config), [processor], words, folder, _SIGLIP_NAMES)


def llava_onevision(folder: Path) -> None:
    """LLaVA-OneVision: tiles that are merged with a learned newline, which belongs to neither tower nor language."""
    from transformers.models.llava_onevision import image_processing_pil_llava_onevision as images
    from transformers.models.llava_onevision import video_processing_llava_onevision as videos

    words = tokenizer(["<image>", "<video>"], {"image": "<image>", "video": "<video>"})
    pins = [[64, 64], [64, 128], [128, 64], [128, 128]]
    config = transformers.LlavaOnevisionConfig(
        image_token_index=words.convert_tokens_to_ids("<image>"),
        video_token_index=words.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pins,
        vision_config=VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
        text_config=TEXT | {"model_type": "qwen2", "vocab_size": len(words)},
    )
    size = {"height": 64, "width": 64}
    processor = transformers.LlavaOnevisionProcessor(
        images.LlavaOnevisionImageProcessorPil(size=size, image_grid_pinpoints=pins),
        words,
        videos.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=64,
        vision_feature_select_strategy="full",
        chat_template=words.chat_template,
    )
    model = transformers.LlavaOnevisionForConditionalGeneration(config)
    save(model, [processor, processor.video_processor], words, folder, _SIGLIP_NAMES)


def mistral3(folder: Path) -> None:
    """Mistral 3: one item of as many rows as the picture is high, with a token that is no embedding after each."""
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
    from transformers.models.pixtral.processing_pixtral import PixtralProcessor

    words = tokenizer(["[IMG]", "[IMG_BREAK]", "[IMG_END]"], {"image": "[IMG]"})
    config = transformers.Mistral3Config(
        image_token_index=words.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        vision_feature_layer=-1,
        vision_config=VISION | {"model_type": "pixtral", "head_dim": 32, "image_size": 256},
        text_config=TEXT | {"model_type": "mistral", "vocab_size": len(words), "head_dim": 32, "sliding_window": None},
        tie_word_embeddings=False,
    )
    images = PixtralImageProcessorPil(size={"longest_edge": 256}, patch_size={"height": 8, "width": 8})
    processor = PixtralProcessor(
        images, words, patch_size=8, spatial_merge_size=2, chat_template=words.chat_template
    )  # fmt: skip
    save(transformers.Mistral3ForConditionalGeneration(config), [processor], words, folder)

"""Tiny random models of families whose pictures are encoded whole, made on the spot: `python -m tests.models.tiny`.

Each has about 0.2 million parameters. The towers' weights are scaled up, so that what is in a picture shows in the
embeddings.
"""

from __future__ import annotations

import sys
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


def template(image_token: str) -> str:
    """A chat template that puts `image_token` where a picture is, and `<video>` where a video is."""
    video = "{% elif c['type'] == 'video' %}<video>"
    part = "{% if c['type'] == 'image' %}" + image_token + video + "{% else %} {{ c['text'] }}{% endif %}"
    return "{% for m in messages %}User:{% for c in m['content'] %}" + part + "{% endfor %}{% endfor %}"


def tokenizer(special: list[str]) -> transformers.PreTrainedTokenizerFast:
    """A byte-level tokenizer of a few hundred tokens."""
    names = ["<unk>", "<s>", "</s>", "<pad>", *special]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=names, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    inner.train_from_iterator(["User: What is in the picture? 0 1 2 3"] * 9, trainer)
    roles = dict(zip(("unk_token", "bos_token", "eos_token", "pad_token"), names, strict=False))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, additional_special_tokens=special, chat_template=template(special[0]), **roles
    )


def llava_onevision(folder: Path) -> None:
    """LLaVA-OneVision: tiles that are merged with a learned newline, which belongs to neither tower nor language."""
    from transformers.models.llava_onevision import image_processing_pil_llava_onevision as images
    from transformers.models.llava_onevision import video_processing_llava_onevision as videos

    words = tokenizer(["<image>", "<video>"])
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
    _save(transformers.LlavaOnevisionForConditionalGeneration(config), processor, words, folder)
    # transformers 5 saves these names in a way that vLLM 0.32 does not map.
    _rename(folder, "vision_tower.", "vision_tower.vision_model.")
    processor.video_processor.save_pretrained(folder)


def mistral3(folder: Path) -> None:
    """Mistral 3: one item of as many rows as the picture is high, with a token that is no embedding after each."""
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil
    from transformers.models.pixtral.processing_pixtral import PixtralProcessor

    words = tokenizer(["[IMG]", "[IMG_BREAK]", "[IMG_END]"])
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
    _save(transformers.Mistral3ForConditionalGeneration(config), processor, words, folder)


def _save(model: Any, processor: Any, words: Any, folder: Path) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and ("vision" in name or "projector" in name):
                parameter.mul_(TOWER_SCALE)
    model.to(torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    words.save_pretrained(folder)


def _rename(folder: Path, before: str, after: str) -> None:
    file = folder / "model.safetensors"
    tensors = {name.replace(before, after, 1): tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


FAMILIES = {"llava_onevision": llava_onevision, "mistral3": mistral3}

if __name__ == "__main__":
    from tests.models import audio

    torch.manual_seed(0)
    (FAMILIES | audio.FAMILIES)[sys.argv[1]](Path(sys.argv[2]))

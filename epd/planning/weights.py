"""How many parameters the parts of a model have: counted on the model itself, built without memory.

Lives in the user's process. transformers builds the model from its configuration on torch's "meta" device. The code of
InternVL2 and MiniCPM-V is on the Hub only: their parts are those of models that transformers knows, and the projector
between them is counted by hand.
"""

from __future__ import annotations

from typing import Any

import msgspec
import torch
import transformers

from epd.config import ConfigError
from epd.planning.shapes import part_names

# The first words of parameter names, after "model." has been taken away.
_LANGUAGE = ("language_model", "text_model", "lm_head", "llm", "embed_tokens", "layers", "norm")
_TOWER = (
    "vision_tower",
    "vision_model",
    "visual",
    "vision_encoder",
    "audio_tower",
    "audio_encoder",
    "connector",
    "multi_modal_projector",
    "aligner",
)


class Parameters(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers of parameters. The projector is between tower and language model, and counted apart from both."""

    tower: int
    projector: int
    language: int
    other: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.tower + self.projector + self.language + self.other


_PROJECTORS = (
    "connector",
    "multi_modal_projector",
    "aligner",
    "merger",
    "visual.merger",
    "visual.deepstack_merger_list",
)


def count_parameters(config: dict[str, Any]) -> Parameters:
    """The parameters of a model with this configuration.

    Args:
        config: `config.json`, as it is.

    Raises:
        ConfigError: transformers does not know the model, and neither do we.
    """
    family = str(config.get("model_type", ""))
    if family == "internvl_chat":
        return _internvl_chat(config)
    if family == "minicpmv":
        return _minicpmv(config)
    try:
        known = transformers.AutoConfig.for_model(**config)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"transformers {transformers.__version__} does not know {family!r}: {error}") from None
    autos = (transformers.AutoModelForImageTextToText, transformers.AutoModelForMultimodalLM)
    auto = next((auto for auto in autos if type(known) in auto._model_mapping), None)
    if auto is None:
        raise ConfigError(f"transformers {transformers.__version__} has no multimodal model for {family!r}")
    counts = dict.fromkeys(("tower", "projector", "language", "other"), 0)
    for name, count in _counts(auto, known):
        counts[_part_of(name)] += count
    return Parameters(**counts)


def _part_of(name: str) -> str:
    name = name.removeprefix("model.")
    if name.startswith(tuple(f"{each}." for each in _PROJECTORS)):
        return "projector"
    first = name.split(".")[0]
    return "language" if first in _LANGUAGE else "tower" if first in _TOWER else "other"


def _counts(auto: Any, config: Any) -> list[tuple[str, int]]:
    """Name and size of each parameter, tied ones once."""
    build = auto.from_config if hasattr(auto, "from_config") else auto
    try:
        with torch.device("meta"):
            model = build(config)
    except (ValueError, AssertionError) as error:  # settings that do not go together
        raise ConfigError(f"transformers cannot build {config.model_type!r}: {error}") from None
    return [(name, parameter.numel()) for name, parameter in model.named_parameters()]


def _size(auto: Any, config: Any) -> int:
    return sum(count for _, count in _counts(auto, config))


def _internvl_chat(config: dict[str, Any]) -> Parameters:
    """InternViT is transformers' InternVL tower, InternLM2 has the matrices of Llama (its q, k and v are one)."""
    tower, text = (config[name] for name in part_names(config))
    vision = transformers.InternVLVisionConfig(
        **{name: tower[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers")},
        num_attention_heads=tower["num_attention_heads"],
        image_size=[tower["image_size"]] * 2,
        patch_size=[tower["patch_size"]] * 2,
        attention_bias=tower["qkv_bias"],
        use_qk_norm=tower["qk_normalization"],
        norm_type=tower["norm_type"],
    )
    kinds = {"internlm2": "llama", "llama": "llama", "qwen2": "qwen2", "phi3": "phi3"}
    if text.get("model_type") not in kinds:
        raise ConfigError(f"language model {text.get('model_type')!r} of InternVL is not known here")
    settings = {name: value for name, value in text.items() if name not in ("model_type", "rope_scaling", "auto_map")}
    language = transformers.AutoConfig.for_model(kinds[text["model_type"]], **settings)
    wide = int(tower["hidden_size"] / float(config["downsample_ratio"]) ** 2)
    narrow = int(text["hidden_size"])
    return Parameters(
        tower=_size(transformers.InternVLVisionModel, vision),
        projector=2 * wide + (wide + 1) * narrow + (narrow + 1) * narrow,  # norm, and two linear layers
        language=_size(transformers.AutoModelForCausalLM, language),
    )


def _minicpmv(config: dict[str, Any]) -> Parameters:
    """SigLIP without its head, Qwen2, and a resampler: one cross-attention from learned queries."""
    if float(config.get("version", 0)) != 2.6:
        raise ConfigError(f"MiniCPM-V {config.get('version')} is not known here; 2.6 is")
    tower = {name: value for name, value in config["vision_config"].items() if name != "model_type"}
    vision = transformers.SiglipVisionConfig(**tower, vision_use_head=False)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    language = transformers.Qwen2Config(
        **{name: config[name] for name in (*names, "vocab_size", "max_position_embeddings")},
        tie_word_embeddings=config.get("tie_word_embeddings", False),
    )
    width, seen = int(config["hidden_size"]), int(tower["hidden_size"])
    attention = 4 * (width + 1) * width
    norms = 3 * 2 * width
    return Parameters(
        tower=_size(transformers.SiglipVisionModel, vision),
        projector=int(config["query_num"]) * width + seen * width + attention + norms + width * width,
        language=_size(transformers.AutoModelForCausalLM, language),
    )

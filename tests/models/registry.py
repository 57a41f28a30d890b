"""The families of tiny models that tests and docs/models.md go through.

A family is one line here and a maker in a module beside this one; a family with further modules adds its line to
`FAMILIES`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from epd.builtin import model_path
from tests.models import audio, llava, qwen, tiles

ITEM = "item"
_GRIDS = {"image": ITEM, "video": "temporal grid"}
_GRID_LIMITS = {"image": 4, "video": 2}
_GRID_NOTES = {
    "image": "attention goes across the picture",
    "video": "two frames to a grid; prefill gets the video whole with its grid, the connector joins its patches",
}
_M_ROPE = "yes, `tests/models/test_m_rope.py`"
_BOTH_M_ROPE = {"image": _M_ROPE, "video": _M_ROPE}


@dataclasses.dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        title: its name for people.
        architecture: vLLM's name for it.
        make: writes a tiny random model into a folder; None for the model that comes with EPD.
        units: modality -> what its items are spread by ("item": not at all).
        limits: vLLM's `limit_mm_per_prompt`.
        engine: further engine options that it needs.
        notes: modality -> what to know of it.
        tested_by: modality -> the test that compares it with plain vLLM, where that is not test_families.py.
        not_served: why the pipeline does not serve it, if so.
    """

    title: str
    architecture: str
    make: Callable[[Path], None] | None
    units: dict[str, str]
    limits: dict[str, int]
    engine: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: dict[str, str] = dataclasses.field(default_factory=dict)
    tested_by: dict[str, str] = dataclasses.field(default_factory=dict)
    not_served: str = ""

    def folder(self, base: Path, name: str) -> Path:
        """Makes the model below `base`, or finds the built-in one."""
        if self.make is None:
            return Path(model_path())
        import torch

        torch.manual_seed(0)
        self.make(base / name)
        return base / name


FAMILIES: dict[str, Family] = {
    "idefics3": Family(
        "Idefics3", "Idefics3ForConditionalGeneration", None, {"image": "tile"}, {"image": 4},
        notes={"image": "the built-in model"}, tested_by={"image": "yes, `tests/pipeline`"},
    ),
    "smolvlm": Family(
        "SmolVLM", "SmolVLMForConditionalGeneration", tiles.smolvlm, {"image": "tile"}, {"image": 4},
        notes={"image": "vLLM runs it with the code of Idefics3"},
    ),
    "internvl": Family(
        "InternVL, InternS1", "InternVLForConditionalGeneration", tiles.internvl,
        {"image": "tile", "video": "frame"}, {"image": 4, "video": 1},
    ),
    "gemma3": Family(
        "Gemma 3", "Gemma3ForConditionalGeneration", tiles.gemma3, {"image": "tile"}, {"image": 4},
        engine={"mm_processor_kwargs": tiles.GEMMA3_CROPS},
        notes={"image": "a picture has crops only with `mm_processor_kwargs` (`do_pan_and_scan`)"},
    ),
    "minicpmv": Family(
        "MiniCPM-V 4.6", "MiniCPMV4_6ForConditionalGeneration", tiles.minicpmv,
        {"image": "slice", "video": "frame"}, {"image": 4, "video": 1}, engine={"dtype": "bfloat16"},
        notes=dict.fromkeys(
            ("image", "video"),
            "its text model has a recurrent state: no `prompt_logprobs`, prompts of 3 tokens or more, no speculative"
            " decoding",
        ),
    ),
    "qwen2_vl": Family(
        "Qwen2-VL", "Qwen2VLForConditionalGeneration", qwen.qwen2_vl, _GRIDS, _GRID_LIMITS,
        notes=_GRID_NOTES, tested_by=_BOTH_M_ROPE,
    ),
    "qwen2_5_vl": Family(
        "Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration", qwen.qwen2_5_vl, _GRIDS, _GRID_LIMITS,
        notes=_GRID_NOTES, tested_by=_BOTH_M_ROPE,
    ),
    "qwen3_vl": Family(
        "Qwen3-VL", "Qwen3VLForConditionalGeneration", qwen.qwen3_vl, _GRIDS, _GRID_LIMITS,
        notes=_GRID_NOTES, tested_by=_BOTH_M_ROPE,
    ),
    "paddleocr_vl": Family(
        "PaddleOCR-VL", "PaddleOCRVLForConditionalGeneration", qwen.paddleocr_vl, {"image": ITEM}, {"image": 4},
        notes={"image": _GRID_NOTES["image"]}, tested_by={"image": _M_ROPE},
    ),
    "llava": Family(
        "LLaVA 1.5", "LlavaForConditionalGeneration", llava.llava, {"image": ITEM}, {"image": 4},
    ),
    "llava_onevision": Family(
        "LLaVA-OneVision", "LlavaOnevisionForConditionalGeneration", llava.llava_onevision,
        {"image": ITEM, "video": ITEM}, {"image": 4, "video": 1},
        notes={
            "image": "the projected tiles are merged with learned newlines",
            "video": "a learned newline follows the last frame only",
        },
    ),
    "mistral3": Family(
        "Mistral 3", "Mistral3ForConditionalGeneration", llava.mistral3, {"image": ITEM}, {"image": 4},
        notes={"image": "attention goes across the picture"},
    ),
    "qwen2_audio": Family(
        "Qwen2-Audio", "Qwen2AudioForConditionalGeneration", audio.qwen2_audio, {"audio": ITEM}, {"audio": 4},
        notes={"audio": "30 s at most"},
    ),
    "audioflamingo3": Family(
        "Audio Flamingo 3", "AudioFlamingo3ForConditionalGeneration", audio.audioflamingo3,
        {"audio": "chunk"}, {"audio": 1}, notes={"audio": "chunks of 30 s; vLLM takes one sound in a prompt"},
    ),
    "glmasr": Family(
        "GLM-ASR", "GlmAsrForConditionalGeneration", audio.glmasr, {"audio": "chunk"}, {"audio": 1},
        notes={"audio": "chunks of 30 s; vLLM takes one sound in a prompt"},
    ),
}  # fmt: skip

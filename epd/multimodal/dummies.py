"""Dummy items of a model, made of noise: what a cut is proved on.

Lives in an encode worker. Touches vLLM's multimodal processors (written against vLLM 0.32:
`vllm.multimodal.processing`): sizes and prompt are those of vLLM's own profiling, pixels and samples are not,
because blank ones would show nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy
from PIL import Image
from vllm.config import VllmConfig
from vllm.config.multimodal import AudioDummyOptions, ImageDummyOptions, MultiModalDummyOptions, VideoDummyOptions
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalKwargsItem, PlaceholderRange
from vllm.multimodal.processing import ProcessorInputs, TimingContext

# Shares of the largest width and height, smallest area first.
_IMAGE_SHARES = ((0.25, 0.25), (0.5, 0.25), (0.5, 0.5), (1.0, 0.5), (0.5, 1.0), (1.0, 1.0))
# Shares of the longest sound: none gives a whole number of windows, so that the last one is shorter.
_AUDIO_SHARES = (0.04, 0.125, 0.25, 0.45, 0.9)
_VIDEO_FRAMES, _VIDEO_SHARES = 6, (0.25, 0.5, 1.0)
# A larger picture would prove no more and take longer.
_MAX_PIXELS = 4 << 20
_BLOCK, _BURST = 8, 2000
# No language model is involved: a short context must not leave a video without frames.
_MIN_SEQ_LEN = 16384


class Dummy(msgspec.Struct, frozen=True):
    """A processed item of noise, its place in the prompt, and what it was made from ("640x320")."""

    item: MultiModalKwargsItem
    position: PlaceholderRange
    size: str


class Dummies:
    """Makes the dummy items of one model."""

    def __init__(self, config: VllmConfig) -> None:
        self._config = config.model_config
        self._processor: Any = MULTIMODAL_REGISTRY.create_processor(self._config)
        self._random = numpy.random.default_rng(0)

    @property
    def modalities(self) -> list[str]:
        """The modalities that the model has and that its options allow."""
        limits = self._processor.info.allowed_mm_limits
        return [name for name in self._processor.info.supported_mm_limits if limits.get(name, 0) > 0]

    def of(self, modality: str) -> Iterator[Dummy]:
        """Items of a modality, in increasing size."""
        for options in _sizes(modality, self._data(modality, {})):
            yield self._processed(modality, self._noise(self._data(modality, options)))

    def _data(self, modality: str, options: dict[str, Any]) -> Any:
        data = self._processor.dummy_inputs.get_dummy_mm_data(
            max(self._config.max_model_len, _MIN_SEQ_LEN), {modality: 1}, MultiModalDummyOptions(options)
        )[modality]
        return data[0] if isinstance(data, list) else data

    def _processed(self, modality: str, data: Any) -> Dummy:
        info = self._processor.info
        text = self._processor.dummy_inputs.get_dummy_text({modality: 1})
        prompt = info.ctx.tokenizer.encode(text, **info.default_tok_params.get_encode_kwargs())
        inputs = ProcessorInputs(prompt, info.parse_mm_data({modality: [data]}, validate=False))
        done = self._processor.apply(inputs, timing_ctx=TimingContext(enabled=False))
        [item], [position] = done["mm_kwargs"][modality], done["mm_placeholders"][modality]
        return Dummy(item, position, _size(data))

    def _noise(self, data: Any) -> Any:
        """The same with random content: blocks of colour and bursts of sound, which scaling does not average away."""
        if isinstance(data, list):  # frames
            return [self._noise(each) for each in data]
        if isinstance(data, tuple):
            frames = self._noise(data[0])
            return frames, _metadata(data[1], len(frames))
        if isinstance(data, Image.Image):
            return Image.fromarray(self._blocks((data.height, data.width, 3)))
        if data.ndim == 1:
            loudness = 10.0 ** self._random.uniform(-3.0, 0.0, -(-len(data) // _BURST)).repeat(_BURST)[: len(data)]
            return (self._random.uniform(-1.0, 1.0, len(data)) * loudness).astype(numpy.float32)
        return self._blocks((max(data.shape[0], _VIDEO_FRAMES), *data.shape[1:]))  # some models' have only two

    def _blocks(self, shape: tuple[int, ...]) -> Any:
        *front, height, width, depth = shape
        small = (*front, -(-height // _BLOCK), -(-width // _BLOCK), depth)
        coarse = self._random.integers(0, 256, small, dtype=numpy.uint8)
        return coarse.repeat(_BLOCK, axis=-3).repeat(_BLOCK, axis=-2)[..., :height, :width, :]


def _sizes(modality: str, largest: Any) -> Iterator[dict[str, Any]]:
    """Options of vLLM for dummy items, smallest first, derived from the largest item."""
    if isinstance(largest, tuple):
        largest = largest[0]
    if isinstance(largest, list):
        largest = numpy.stack([numpy.asarray(frame) for frame in largest[:_VIDEO_FRAMES]])
    if isinstance(largest, Image.Image):
        for across, down in _IMAGE_SHARES:
            width, height = max(1, int(largest.width * across)), max(1, int(largest.height * down))
            if width * height <= _MAX_PIXELS:
                yield {modality: ImageDummyOptions(width=width, height=height)}
    elif largest.ndim == 1:
        for share in _AUDIO_SHARES:
            yield {modality: AudioDummyOptions(length=max(1, int(len(largest) * share)))}
    else:
        frames, height, width, _ = largest.shape
        for share in _VIDEO_SHARES:
            yield {
                modality: VideoDummyOptions(
                    num_frames=min(frames, _VIDEO_FRAMES),
                    width=max(1, int(width * share)),
                    height=max(1, int(height * share)),
                )
            }


def _metadata(metadata: Any, num_frames: int) -> Any:
    """A video's metadata, with another number of frames."""
    if not isinstance(metadata, dict) or metadata.get("total_num_frames") == num_frames:
        return metadata
    return metadata | {
        "total_num_frames": num_frames,
        "frames_indices": list(range(num_frames)),
        "duration": num_frames / (metadata.get("fps") or 1.0),
    }


def _size(data: Any) -> str:
    if isinstance(data, list):
        return f"{len(data)} frames of {_size(data[0])}"
    if isinstance(data, tuple):
        data = data[0]
    if isinstance(data, Image.Image):
        return f"{data.width}x{data.height}"
    return f"{len(data)} samples" if data.ndim == 1 else f"{data.shape[0]} frames of {data.shape[2]}x{data.shape[1]}"

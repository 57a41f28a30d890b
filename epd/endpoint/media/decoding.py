"""Decoders of video and audio: vLLM's, within the endpoint's limits while they decode.

Lives in the endpoint process, in vLLM's threads for media; owns nothing. Written against vLLM 0.32
(`vllm.multimodal.media`, `vllm.multimodal.video`). Frames and samples are vLLM's own, so that the model sees what it
would see in `vllm serve`; only refusals are added.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from vllm.exceptions import VLLMError
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.media import audio as vllm_audio
from vllm.multimodal.media.audio import AudioMediaIO
from vllm.multimodal.media.image import ImageMediaIO
from vllm.multimodal.media.video import VideoMediaIO

from epd.config import EndpointConfig
from epd.endpoint.http.refusals import RefusedError
from epd.endpoint.media import probing
from epd.errors import ErrorCode
from epd.multimodal import containers


class VideoIO(VideoMediaIO):
    """The video decoder of vLLM, which samples and decodes no more than is allowed.

    Args:
        image_io: decodes the frames of `video/jpeg`.
        limits: the endpoint's.
        kwargs: vLLM's `media_io_kwargs` of this modality.
    """

    def __init__(self, image_io: ImageMediaIO, limits: EndpointConfig, **kwargs: Any) -> None:
        super().__init__(image_io, **kwargs)
        self._limits = limits
        self.video_loader: Any = guarded(type(self.video_loader), limits)

    def get_max_bytes(self) -> int:
        """The largest file that is fetched."""
        return self._limits.max_body_bytes

    def look(self, data: bytes) -> int:
        """How many bytes the sampled frames will take, as far as that can be told; nothing is decoded.

        Raises:
            RefusedError: there is nothing or too much to decode.
        """
        frame_bytes = probing.check_video(data, self._limits)
        num_frames = self.num_frames if self.num_frames > 0 else self._limits.max_video_frames
        return min(frame_bytes * num_frames, self._limits.max_decoded_bytes)

    def look_at_frames(self, data: str) -> int:
        """The same for the contents of a `video/jpeg` data URL."""
        return probing.check_frames(data, self._limits)

    def load_bytes(self, data: bytes) -> MediaWithBytes[Any]:
        """The sampled frames and their metadata.

        Raises:
            RefusedError: it cannot be decoded, or has nothing or too much to decode.
        """
        probing.check_video(data, self._limits)
        with _refusing(ErrorCode.INVALID_VIDEO, "video"):
            found = super().load_bytes(data)
            return _with_frames(found)

    def load_base64(self, media_type: str, data: str) -> MediaWithBytes[Any]:
        """The same for a data URL, which may also be `video/jpeg`.

        Raises:
            RefusedError: as for `load_bytes`.
        """
        with _refusing(ErrorCode.INVALID_VIDEO, "video"):
            if media_type.lower() == probing.JPEG_FRAMES:
                probing.check_frames(data, self._limits)
            return _with_frames(super().load_base64(media_type, data))

    def load_file(self, filepath: Path) -> MediaWithBytes[Any]:
        """The same for a local file.

        Raises:
            RefusedError: as for `load_bytes`.
        """
        return self.load_bytes(_read(filepath, self._limits))


class AudioIO(AudioMediaIO):
    """The audio decoder of vLLM, which decodes no more than is allowed.

    Args:
        limits: the endpoint's.
        kwargs: vLLM's `media_io_kwargs` of this modality.
    """

    def __init__(self, limits: EndpointConfig, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._limits = limits

    def load_bytes(self, data: bytes) -> tuple[Any, float]:
        """The samples, float32 of shape (samples,), and how many there are per second.

        Raises:
            RefusedError: it cannot be decoded, is empty or too long, or has samples that are not finite numbers.
        """
        with _refusing(ErrorCode.INVALID_AUDIO, "audio"):
            self._validate_encoded_size(len(data))
            probing.check_audio(data, self._limits)
            samples, rate = vllm_audio.load_audio(
                BytesIO(data),
                sr=None,
                max_duration_s=self._limits.max_audio_s,
                max_decode_bytes=self._limits.max_decoded_bytes,
                backend=self._backend(data),
            )
            probing.check_sound(len(samples), rate, 1, self._limits)
            if not np.isfinite(samples).all():
                raise RefusedError(ErrorCode.INVALID_AUDIO, "the audio has samples that are not finite numbers")
            return samples, rate

    def load_file(self, filepath: Path) -> tuple[Any, float]:
        """The same for a local file.

        Raises:
            RefusedError: as for `load_bytes`.
        """
        return self.load_bytes(_read(filepath, self._limits))

    def _backend(self, data: bytes) -> str | None:
        """The decoder that vLLM would choose, but without asking FFmpeg to guess what libsndfile cannot read."""
        if self.audio_backend is not None or vllm_audio.AudioDecoder is not None:
            return str(self.audio_backend or "auto")
        return "pyav" if containers.kind_of(data) in containers.BY_FFMPEG else "soundfile"


def settle_resampling(processor: Any) -> None:
    """Makes processors resample audio with soxr if torchaudio, vLLM's choice for most models, is not installed.

    CPU builds do not have it, and vLLM would fail on every sound whose rate is not the model's.
    """
    if importlib.util.find_spec("torchaudio") is not None:
        return
    for parser in (processor.data_parser, processor.info.data_parser):
        if parser.audio_resampler.method == "torchaudio":
            parser.audio_resampler.method = "soxr"


def guarded(loader: Any, limits: EndpointConfig) -> Any:
    """A loader that samples and reads frames alike, but raises `RefusedError` before it would exceed `limits`."""

    class Guarded(loader):
        """Checks what the decoder finds, since headers may have said something else."""

        @classmethod
        def compute_frames_index_to_sample(cls, source: Any, target: Any, **kwargs: Any) -> list[int]:
            """The frames to sample, as vLLM chooses them for this model."""
            probing.check_length(source.total_frames_num, source.duration, limits)
            found: list[int] = super().compute_frames_index_to_sample(source=source, target=target, **kwargs)
            probing.check_sampled(1, 1, len(found), limits)
            return found

        @classmethod
        def read_frames(cls, cap: Any, frame_idx: list[int], *args: Any, **kwargs: Any) -> Any:
            """The frames, decoded by OpenCV; memory for all of them is allocated at once."""
            import cv2

            width, height = (int(cap.get(each)) for each in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
            probing.check_sampled(width, height, len(frame_idx), limits)
            return super().read_frames(cap, frame_idx, *args, **kwargs)

    return Guarded


def _with_frames(found: MediaWithBytes[Any]) -> MediaWithBytes[Any]:
    if len(found.media[0]) < 1:
        raise RefusedError(ErrorCode.INVALID_VIDEO, "none of the frames of the video can be decoded")
    return found


def _read(path: Path, limits: EndpointConfig) -> bytes:
    with path.open("rb") as file:
        content = file.read(limits.max_body_bytes + 1)
    if len(content) > limits.max_body_bytes:
        raise RefusedError(ErrorCode.BODY_TOO_LARGE, f"the file is larger than {limits.max_body_bytes} bytes")
    return content


@contextmanager
def _refusing(code: ErrorCode, what: str) -> Iterator[None]:
    """Takes whatever a decoder raises for the file's fault."""
    try:
        yield
    except (RefusedError, VLLMError):
        raise
    except Exception as error:
        raise RefusedError(code, f"the {what} cannot be decoded: {str(error)[:200]}") from error

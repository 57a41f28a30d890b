"""From a picture's file to its pixels: vLLM's decoder within limits, and the name of the pixels.

Lives in the endpoint process, mostly in threads; owns which files were decoded before. Written against vLLM 0.32:
`vllm.multimodal.media.image`, `vllm.multimodal.image`.

A picture is named by a digest of its decoded pixels. A file that was decoded before is known by a digest of its bytes,
and is decoded again only if its processed item is gone. Grey pictures of more than 8 bits are scaled to 8, as every
viewer shows them; vLLM would clip them, mostly to white.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import ClassVar

import numpy as np
from blake3 import blake3
from PIL import Image
from vllm.multimodal.image import normalize_image
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.media.image import ImageMediaIO

from epd.config import EndpointConfig
from epd.endpoint.media.probing import BYTES_PER_PIXEL, check_image, open_picture
from epd.endpoint.media.stored_picture import StoredPicture

_KNOWN_FILES = 65_536
_STRIP_BYTES = 1 << 20


class LazyPicture(MediaWithBytes[Image.Image]):
    """A picture whose pixels are decoded when they are first needed; `pixels` names them before that."""

    def __init__(
        self, io: PictureIO, file: bytes, pixels: str, kept: StoredPicture | None, media: Image.Image | None
    ) -> None:
        self._io, self._media = io, media
        self.original_bytes, self.io_config = file, None
        self.pixels, self.kept = pixels, kept

    @property
    def media(self) -> Image.Image:
        """The decoded picture, by vLLM's own decoder."""
        if self._media is None:
            self._media = self._io.decode(self.original_bytes)
        return self._media

    def let_go(self) -> None:
        """Forgets the pixels; they are decoded again if they are needed."""
        self._media = None


class PictureIO(ImageMediaIO):
    """The picture decoder of vLLM, which remembers the name of each file's pixels."""

    limits: ClassVar[EndpointConfig] = EndpointConfig()
    # The name of a file's pixels and how many there are, by the file and the decoder's settings.
    _known: ClassVar[OrderedDict[tuple[bytes, str], tuple[str, int]]] = OrderedDict()
    _lock = threading.Lock()

    @property
    def settings(self) -> str:
        """The settings that change a file's pixels."""
        return repr((self.image_mode, self.rgba_background_color, sorted(self.kwargs.items())))

    def get_max_bytes(self) -> int:
        """The largest file that is fetched."""
        return self.limits.max_body_bytes

    def look(self, data: bytes) -> tuple[str, int]:
        """The name of a file's pixels, or "", and how many bytes they take; nothing is decoded.

        Raises:
            RefusedError: it is not a picture, or too large.
        """
        found = self._find(blake3(data).digest())
        return found if found is not None else ("", check_image(data, self.limits))

    def load_bytes(self, data: bytes, kept: StoredPicture | None = None) -> LazyPicture:
        """A picture; decoded now only if it was never decoded before.

        Raises:
            RefusedError: it is not a picture, or too large.
            ValueError: it cannot be decoded.
        """
        settings = self.settings
        digest = blake3(data).digest() if kept is None else kept.file_digest
        found = self._find(digest)
        pixels = found[0] if found is not None else None
        if kept is not None:
            pixels = kept.pixels.get(settings)
        media = None
        if pixels is None:
            check_image(data, self.limits)
            media = self.decode(data)
            pixels = _pixels_digest(media)
            self._remember(digest, pixels, media.width * media.height * BYTES_PER_PIXEL)
            if kept is not None:
                kept.pixels[settings], kept.size = pixels, media.size
        return LazyPicture(self, data, pixels, kept, media)

    def decode(self, data: bytes) -> Image.Image:
        """The picture, upright, in the requested mode.

        Raises:
            ValueError: it cannot be decoded.
        """
        image = _as_8_bits(data) if self.image_mode is not None else None
        if image is not None:
            return self._converted(image)
        media: Image.Image = super().load_bytes(data).media
        return media

    def _converted(self, image: Image.Image) -> Image.Image:
        converted: Image.Image = self._convert_image_mode(image)
        return converted

    def _find(self, digest: bytes) -> tuple[str, int] | None:
        key = digest, self.settings
        with self._lock:
            found = self._known.get(key)
            if found is not None:
                self._known.move_to_end(key)
            return found

    def _remember(self, digest: bytes, pixels: str, num_bytes: int) -> None:
        with self._lock:
            self._known[digest, self.settings] = pixels, num_bytes
            while len(self._known) > _KNOWN_FILES:
                self._known.popitem(last=False)


def _as_8_bits(data: bytes) -> Image.Image | None:
    """A grey picture of more than 8 bits as one of 8, upright; None for all others.

    Integers of 32 bits and floats do not tell their scale: the smallest usual one that contains all values is taken, as
    in the client (`epd/client/pixels.py`).

    Raises:
        ValueError: it cannot be decoded, or its numbers cannot be brightness.
    """
    with open_picture(data) as opened:
        if opened.mode not in ("I", "F") and not opened.mode.startswith("I;16"):
            return None
        try:
            opened.load()
        except OSError as error:
            raise ValueError(f"Failed to load image: {error}") from error
        image = normalize_image(opened)
    values = np.asarray(image)
    scales = {"I": (255, 65535), "F": (1, 255, 65535)}.get(image.mode, (65535,))
    darkest, brightest = float(values.min()), float(values.max())  # NaN if any is
    white = next((scale for scale in scales if darkest >= 0 and brightest <= scale), None)
    if white is None:
        raise ValueError(f"Failed to load image: its numbers, {darkest:g} to {brightest:g}, cannot be brightness")
    rows = [np.rint(strip.astype(np.float64) * (255.0 / white)).astype(np.uint8) for strip in _strips(values)]
    return Image.fromarray(np.concatenate(rows))


def _strips(values: np.ndarray) -> list[np.ndarray]:
    height = max(1, _STRIP_BYTES // max(1, values[0].nbytes))
    return [values[top : top + height] for top in range(0, len(values), height)]


def _pixels_digest(image: Image.Image) -> str:
    """Names decoded pixels; takes a strip of rows at a time, so that they are not in memory twice."""
    palette = image.palette.palette if image.palette is not None else b""
    hasher = blake3(repr((image.mode, image.size, bytes(palette), image.info.get("transparency"))).encode())
    height = max(1, _STRIP_BYTES // (image.width * 4))
    for top in range(0, image.height, height):
        hasher.update(image.crop((0, top, image.width, min(top + height, image.height))).tobytes())
    return str(hasher.hexdigest())

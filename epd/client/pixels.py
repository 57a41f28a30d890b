"""Turns pixels in Pillow's and numpy's forms into an image that PNG can hold without loss.

Lives in the user's process; pure. numpy is not imported: an array brings its own methods.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, Protocol

from PIL import Image, ImageOps

from epd.client.errors import PictureError

__all__ = ["Array", "from_array", "is_array", "plain"]

_AS_IT_IS = frozenset({"1", "L", "LA", "P", "RGB", "RGBA"})
_WITH_ALPHA = {"PA": "RGBA", "RGBa": "RGBA", "La": "LA"}
_NUMBERS = frozenset("buif")  # numpy's kinds of bool, int, uint and float
_BATCH_NDIM = 4
_CHANNELS = (1, 2, 3, 4)
_WIDE = 0xFFFF


class Array(Protocol):
    """A numpy array: (height, width), or (height, width, channels) with 1 to 4 channels: L, LA, RGB or RGBA."""

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """How numpy arrays describe themselves."""


def is_array(given: Any) -> bool:
    """Return whether it is an array of numbers that may be one picture; of four dimensions, it is several."""
    kind = getattr(getattr(given, "dtype", None), "kind", "")
    return kind in _NUMBERS and hasattr(given, "__array_interface__") and given.ndim < _BATCH_NDIM


def plain(image: Image.Image) -> Image.Image:
    """Return an upright copy in a mode that PNG has.

    It is turned as its EXIF orientation says, if it still carries one. Grey of more bits becomes grey of 8. ``I`` and
    ``F`` do not tell their scale: the smallest usual one that contains all values is taken, 0 to 255 or 65535, and for
    ``F`` also 0 to 1. The server does the same with files.

    Raises:
        PictureError: Its numbers cannot be brightness.
        Exception: Anything that Pillow raises for a broken file that it only reads now.
    """
    image.load()
    upright = image
    with contextlib.suppress(Exception):  # unreadable EXIF is ignored, as the server does
        upright = ImageOps.exif_transpose(image)
    if upright is image:
        upright = image.copy()
    # Other metadata, such as a colour profile, does not change the pixels that the server sees.
    upright.info = {key: value for key, value in upright.info.items() if key == "transparency"}
    mode = upright.mode
    if mode in _AS_IT_IS:
        return upright
    if mode == "F":
        return _real(upright)
    if mode == "I":
        white = _white_of_whole(*upright.getextrema())
        return _grey(upright) if white == _WIDE else upright.convert("L")
    if mode.startswith("I;16"):
        return _grey(upright.convert("I"))
    return upright.convert(_WITH_ALPHA.get(mode, "RGB"))


def from_array(array: Any) -> Image.Image:
    """Return an array as an image of a mode that PNG has.

    ``uint8`` is taken as it is, ``uint16`` as 16 bits: colours keep the upper 8 and grey is rounded, as for files. Of
    bools, True is white. Other types do not tell their scale: see ``plain``.

    Raises:
        PictureError: Its shape is not (height, width) or (height, width, 1 to 4), or its numbers cannot be brightness.
    """
    shape = tuple(array.shape)
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in _CHANNELS) or not array.size:
        raise PictureError(
            f"an array of shape {shape} is not a picture: it must be (height, width) or (height, width, channels) "
            f"with 1 to 4 channels; give several pictures as a list"
        )
    if len(shape) == 3 and shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(_as_8_bits(array))


def _as_8_bits(array: Any) -> Any:
    kind, num_bytes = array.dtype.kind, array.dtype.itemsize
    if kind == "b":
        return array.astype("uint8") * 255
    if kind == "u" and num_bytes == 1:
        return array
    low, high = array.min(), array.max()  # NaN if any is
    if kind == "f":
        factor = 255 / _white_of_real(float(low), float(high))
        return (array.astype("float32" if num_bytes < 4 else array.dtype) * factor).round().astype("uint8")
    is_wide = (kind == "u" and num_bytes == 2) or _white_of_whole(int(low), int(high)) == _WIDE
    if not is_wide:
        return array.astype("uint8")
    wide = array.astype("uint32")
    return ((wide + 128) // 257 if array.ndim == 2 else wide >> 8).astype("uint8")


def _grey(wide: Image.Image) -> Image.Image:
    """An ``I`` image of 16 bits as ``L``."""
    return wide.point(lambda value: value * (1 / 257) + 0.5).convert("L")


def _real(image: Image.Image) -> Image.Image:
    """An ``F`` image as ``L``."""
    extrema: Any = image.getextrema()
    mean: Any = image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))  # NaN if any is; the extrema pass over it
    factor = 255 / _white_of_real(*(extrema if math.isfinite(mean) else (mean, mean)))
    return image.point(lambda value: value * factor + 0.5).convert("L")


def _white_of_whole(low: int, high: int) -> int:
    """The value of white for whole numbers from ``low`` to ``high``."""
    if low < 0 or high > _WIDE:
        raise PictureError(f"these integers, {low} to {high}, cannot be brightness: that is 0 to 255 or 0 to 65535")
    return 255 if high <= 255 else _WIDE


def _white_of_real(low: float, high: float) -> int:
    """The value of white for numbers from ``low`` to ``high``."""
    if not (low >= 0 and high <= _WIDE):  # also true if one is NaN
        raise PictureError(
            f"these numbers, {low:g} to {high:g}, cannot be brightness: that is 0 to 1, 0 to 255 or 0 to 65535"
        )
    return 1 if high <= 1 else 255 if high <= 255 else _WIDE

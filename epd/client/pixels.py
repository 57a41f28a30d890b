"""Pixels in the forms that Pillow and numpy have for them, turned into an image that PNG can hold without loss.

Lives in the user's process; pure. numpy is not imported: an array brings its own methods.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, Protocol

from PIL import Image, ImageOps

from epd.client.errors import PictureError

__all__ = ["Array", "from_array", "is_array", "plain"]

_AS_IT_IS = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})
_WITH_ALPHA = {"PA": "RGBA", "RGBa": "RGBA", "La": "LA"}
_NUMBERS = frozenset("buif")  # numpy's kinds of bool, int, uint and float
_BATCH_NDIM = 4
_CHANNELS = (1, 2, 3, 4)


class Array(Protocol):
    """A numpy array: (height, width), or (height, width, channels) with 1 to 4 channels: L, LA, RGB or RGBA."""

    @property
    def __array_interface__(self) -> dict[str, Any]:
        """What numpy arrays say about themselves."""


def is_array(given: Any) -> bool:
    """Return whether it is an array of numbers that may be one picture; of four dimensions, it is several."""
    kind = getattr(getattr(given, "dtype", None), "kind", "")
    return kind in _NUMBERS and hasattr(given, "__array_interface__") and given.ndim < _BATCH_NDIM


def plain(image: Image.Image) -> Image.Image:
    """Return a copy that stands upright and is of a mode that PNG has.

    It is turned as its EXIF orientation says, if it still carries one, as the server turns files. Grey of 16 bits
    stays so, and the server scales it. ``I`` and ``F`` have no range of their own: see ``_whole`` and ``_real``.

    Raises:
        PictureError: Its numbers are no brightness.
        Exception: Anything that Pillow raises for a broken file that it reads only now.
    """
    image.load()
    upright = image
    with contextlib.suppress(Exception):  # an EXIF that cannot be read says nothing; so does the server think
        upright = ImageOps.exif_transpose(image)
    if upright is image:
        upright = image.copy()
    # What else a file says, such as its colour profile, changes no pixel that the server sees.
    upright.info = {key: value for key, value in upright.info.items() if key == "transparency"}
    mode = upright.mode
    if mode in _AS_IT_IS:
        return upright
    if mode == "I":
        return _whole(upright)
    if mode == "F":
        return _real(upright)
    if mode.startswith("I;16"):  # other orders of bytes
        return upright.convert("I").convert("I;16")
    return upright.convert(_WITH_ALPHA.get(mode, "RGB"))


def from_array(array: Any) -> Image.Image:
    """Return an array as an image of a mode that PNG has.

    ``uint8`` is taken as it is; ``uint16`` as 16 bits, of which colours keep the upper 8, as in files; of bools, True
    is white. Other numbers have no range of their own: see ``_whole`` and ``_real``.

    Raises:
        PictureError: Its shape is not (height, width) or (height, width, 1 to 4), or its numbers are no brightness.
    """
    shape = tuple(array.shape)
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] not in _CHANNELS) or not array.size:
        raise PictureError(
            f"an array of shape {shape} is no picture: it has the shape (height, width) or (height, width, channels) "
            f"with 1 to 4 channels; give several pictures as a list"
        )
    if len(shape) == 3 and shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype.kind == "b":
        array = array.astype("uint8") * 255
    elif array.dtype.kind == "f":
        factor = _factor_of_real(float(array.min()), float(array.max()))  # NaN if any is
        array = (array * factor + 0.5).astype("uint8")
    elif array.dtype.itemsize > 1:
        is_wide = array.dtype.kind == "u" and array.dtype.itemsize == 2
        array = array.astype("<u2" if is_wide or _is_wide(int(array.min()), int(array.max())) else "uint8")
    elif array.dtype.kind == "i":
        _is_wide(int(array.min()), int(array.max()))
        array = array.astype("uint8")
    if array.dtype.itemsize == 2 and array.ndim == 3:
        array = (array >> 8).astype("uint8")
    return Image.fromarray(array)


def _whole(image: Image.Image) -> Image.Image:
    """An ``I`` image as ``L`` if all its values are 0 to 255, else as ``I;16`` if they are 0 to 65535."""
    low, high = image.getextrema()
    return image.convert("I;16" if _is_wide(low, high) else "L")  # type: ignore[arg-type]


def _real(image: Image.Image) -> Image.Image:
    """An ``F`` image as ``L``: values from 0 to 1 are stretched, if all are, else they are 0 to 255."""
    low, high = image.getextrema()
    mean = image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0))  # NaN if any is; the extrema pass over it
    factor = _factor_of_real(*((low, high) if math.isfinite(mean) else (mean, mean)))  # type: ignore[arg-type]
    return image.point(lambda value: value * factor + 0.5).convert("L")


def _is_wide(low: int, high: int) -> bool:
    """Whether whole numbers are brightness of 16 bits, rather than of 8."""
    if low < 0 or high > 0xFFFF:
        raise PictureError(f"these whole numbers, {low} to {high}, are no brightness: that is 0 to 255 or 0 to 65535")
    return high > 0xFF


def _factor_of_real(low: float, high: float) -> int:
    """By what numbers of 0 to 1, or of 0 to 255, are multiplied to be brightness of 8 bits."""
    if not (low >= 0 and high <= 255):  # also where one is NaN
        raise PictureError(f"these numbers, {low:g} to {high:g}, are no brightness: that is 0 to 1 or 0 to 255")
    return 255 if high <= 1 else 1

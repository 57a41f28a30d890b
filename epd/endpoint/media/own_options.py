"""What a request may ask of the processor of its media (`mm_processor_kwargs`, where requests are trusted with them).

Lives in the endpoint process; pure. Processors take any number for a size, and make what is asked for: a small picture
could become one of more memory than there is. What comes of the options that are taken is checked again, by its shapes
(`epd.multimodal.item_shapes`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from epd.config import EndpointConfig
from epd.endpoint.http.refusals import RefusedError
from epd.errors import ErrorCode

_MAX_PIECES = 256
_LENGTH = re.compile(r"edge|height|width|(^|_)size$")
_PIECES = re.compile(r"crop|tile|slice|patches|dynamic_patch")


def check_options(options: Any, config: EndpointConfig) -> None:
    """Checks the numbers in a request's own options by what they are called.

    Raises:
        RefusedError: a size, or a number of pixels, pieces or frames, is more than media may have here.
    """
    for name, value in _numbers("", options):
        most = _most(name, config)
        if most is not None and not value <= most:
            text = f"mm_processor_kwargs: {name[:64]!r} is {value}; at most {most} is accepted"
            raise RefusedError(ErrorCode.INVALID_REQUEST, text)


def _most(name: str, config: EndpointConfig) -> int | None:
    """The largest value of a number with this name; None if it is not a size."""
    if "pixels" in name:
        return config.max_pixels
    if "frames" in name:
        return config.max_video_frames
    if _PIECES.search(name):
        return _MAX_PIECES
    return math.isqrt(config.max_pixels) if _LENGTH.search(name) else None


def _numbers(name: str, value: Any) -> Iterator[tuple[str, int | float]]:
    """All numbers, each with the name that is nearest to it."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield from _numbers(str(key), each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _numbers(name, each)
    elif isinstance(value, int | float):
        yield name, value

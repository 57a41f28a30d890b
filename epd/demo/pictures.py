"""The demo's picture: drawn with characters, and in fresh variants that nothing has seen before.

Lives in the user's process; pure but for reading the picture.
"""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

_INK = " .:-=+*#%@"


def characters(path: Path, columns: int) -> list[str]:
    """The picture as lines of `columns` characters, dark where the picture is dark."""
    with Image.open(path) as picture:
        grey = picture.convert("L")
    height = max(1, round(columns * grey.height / grey.width / 2))  # characters are twice as high as wide
    small = grey.resize((columns, height), Image.Resampling.BOX)
    used = [value for value, count in enumerate(grey.histogram()) if count]
    darkest, lightest = used[0], used[-1]
    scale = (len(_INK) - 1) / max(1, lightest - darkest)
    ink = "".join(_INK[max(0, round((lightest - value) * scale))] for value in small.tobytes())
    return [ink[at : at + columns] for at in range(0, len(ink), columns)]


def variants(path: Path, count: int) -> list[bytes]:
    """PNG files of `count` pictures of the same shape as this one, each a shade darker.

    They look alike, but no two of them share a patch, byte for byte, so no cache knows them.
    """
    with Image.open(path) as picture:
        original = picture.convert("RGB")
    found = []
    for shade in range(1, count + 1):
        buffer = io.BytesIO()
        original.point(lambda value, shade=shade: max(0, value - shade)).save(buffer, "PNG")
        found.append(buffer.getvalue())
    return found

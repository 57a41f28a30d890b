"""Pictures in any form people have them, turned into what the chat API takes: a URL.

Files and bytes are sent unchanged in a ``data:`` URL whose media type comes from their first bytes;
``PIL`` images are written as PNG, losslessly; URLs are handed on for the server to fetch. Lives in
the user's process; blocks, so the asynchronous client calls it in a thread.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image

from epd.client.errors import PictureError
from epd.client.types import Media

__all__ = ["Picture", "is_local", "media_type", "picture_file", "picture_url", "with_picture_urls"]

Picture: TypeAlias = str | Path | bytes | bytearray | memoryview | Image.Image | Media
"""A path, a URL (http, https, data, epd-media), a file's bytes, a ``PIL.Image.Image``, or what ``upload`` returned."""

_URL_SCHEMES = ("http:", "https:", "data:", "epd-media:")
_PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16"})


def picture_url(picture: Picture) -> str:
    """Return the URL under which the server will find the picture.

    Args:
        picture: A string is a URL if it starts with one of the known schemes, else a path.

    Raises:
        PictureError: The file is missing or unreadable, the bytes are no picture of a known kind, or
            the object is not a picture at all.
    """
    if isinstance(picture, Media):
        return picture.url
    if isinstance(picture, str) and picture.lower().startswith(_URL_SCHEMES):
        return picture
    data = picture_file(picture)
    return f"data:{media_type(data)};base64,{base64.b64encode(data).decode('ascii')}"


def picture_file(picture: Picture) -> bytes:
    """Return the picture as a file of a known kind.

    Raises:
        PictureError: As ``picture_url``, or it is an address.
    """
    if isinstance(picture, Media) or (isinstance(picture, str) and picture.lower().startswith(_URL_SCHEMES)):
        raise PictureError("this picture is an address; what is uploaded is a path, bytes or a PIL image")
    if isinstance(picture, str | Path):
        return _checked(_read(picture), repr(str(picture)))
    if isinstance(picture, bytes | bytearray | memoryview):
        return _checked(bytes(picture), "these bytes")
    if isinstance(picture, Image.Image):
        return _png(picture)
    raise PictureError(f"a picture is a path, a URL, bytes or a PIL image, not {type(picture).__name__}")


def is_local(picture: Any) -> bool:
    """Return whether the picture is here, not an address."""
    if isinstance(picture, str):
        return not picture.lower().startswith(_URL_SCHEMES)
    return isinstance(picture, Path | bytes | bytearray | memoryview | Image.Image)


def with_picture_urls(
    messages: list[dict[str, Any]], url_of: Callable[[Picture], str] = picture_url
) -> list[dict[str, Any]]:
    """Return the messages with ``{"type": "image", "image": picture}`` parts as ``image_url`` parts.

    The argument is left as it is; other keys of such a part, and all other parts, are kept. ``url_of`` gives a
    picture's URL.

    Raises:
        PictureError: As ``picture_url``.
    """
    return [
        {**message, "content": [_part(part, url_of) for part in message["content"]]}
        if isinstance(message.get("content"), list | tuple)
        else message
        for message in messages
    ]


def _part(part: Any, url_of: Callable[[Picture], str]) -> Any:
    if not isinstance(part, dict) or part.get("type") != "image":
        return part
    rest = {key: value for key, value in part.items() if key not in ("type", "image")}
    if "image" not in part:
        raise PictureError('a content part of type "image" needs its picture under the key "image"')
    return {**rest, "type": "image_url", "image_url": {"url": url_of(part["image"])}}


def _read(path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise PictureError(f"there is no picture file {str(path)!r}") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        reason = getattr(error, "strerror", None) or error
        raise PictureError(f"cannot read the picture file {str(path)!r}: {reason}") from error


def _checked(data: bytes, what: str) -> bytes:
    if media_type(data) is None:
        raise PictureError(
            f"{what} is not PNG, JPEG, WebP, GIF or BMP; open it with PIL and pass the image instead"
            if data
            else f"{what} is empty"
        )
    return data


def media_type(data: bytes) -> str | None:
    """Return the media type that the first bytes tell, or None."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if data.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "image/webp"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if data.startswith(b"BM"):
        return "image/bmp"
    return None


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    try:
        ready = image if image.mode in _PNG_MODES else image.convert("RGB")
        ready.save(buffer, "PNG", compress_level=1)  # size matters little beside encoding time
    except (OSError, ValueError, SyntaxError) as error:  # what PIL raises for broken lazy files
        raise PictureError(f"cannot write this {image.mode} image as PNG: {error}") from error
    return buffer.getvalue()

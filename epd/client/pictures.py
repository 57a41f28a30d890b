"""Pictures in any form people have them, turned into what the chat API takes: a URL.

Files and bytes are sent unchanged in a ``data:`` URL whose media type comes from their first bytes; images and arrays
are written as PNG, losslessly (``epd.client.pixels``); The server fetches URLs, including ``file://``, which
names a file on the server's host. Lives in the user's process; a ``LocalPicture`` blocks, so the asynchronous client
calls it in a thread.
"""

from __future__ import annotations

import base64
import functools
import io
from typing import Any, TypeAlias

from blake3 import blake3
from PIL import Image

from epd.client.errors import PictureError
from epd.client.given import File, is_file, read
from epd.client.pixels import Array, from_array, is_array, plain
from epd.client.types import Media

__all__ = ["PICTURE_FORMS", "LocalPicture", "Picture", "is_picture", "media_type", "picture_or_url"]

Picture: TypeAlias = File | Image.Image | Array | Media
"""A path, a URL (http, https, data, file, epd-media), a file's bytes, an open file, a ``PIL.Image.Image``, a numpy
array (``epd.client.pixels.from_array``), or what ``upload`` returned."""

PICTURE_FORMS = "a path, a URL, bytes, an open file, a PIL image, a numpy array or an upload"

_URL_SCHEMES = ("http:", "https:", "data:", "file:", "epd-media:")
_STARTS = (
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"\xff\xd8\xff", "jpeg"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "jp2"),
    (b"\xff\x4f\xff\x51", "jp2"),
    (b"\0\0\x01\0", "x-icon"),
)


class LocalPicture:
    """A local picture, as it was when it was loaded: what is hashed, sent and uploaded are the same pixels.

    ``load`` reads a path each time a picture is used, and ``digest`` hashes what was read: a file that has changed is
    never taken for its old self, whatever its size and times say. That takes 1.2 ms for a file of 5 MB (in the page
    cache) and 79 ms for a PIL image of 12 megapixels (`python -m benchmarks hash`; 2 cores, x86_64, 2026-11-28). PNG is
    written only if it is sent.

    Raises:
        PictureError: It is not in ``PICTURE_FORMS``, or an address.
    """

    def __init__(self, picture: Picture) -> None:
        if not is_picture(picture):
            raise PictureError(f"a picture must be {PICTURE_FORMS}, not {type(picture).__name__}")
        if _address(picture) is not None:
            raise PictureError("this picture is an address; only local ones can be uploaded: a path, bytes or an image")
        self._given: Any = picture
        self._file: bytes | None = None
        self._image: Image.Image | None = None

    def load(self) -> None:
        """Read the picture as it is now; call it before anything else.

        Raises:
            PictureError: The file is missing or unreadable, or not a picture of a known kind.
        """
        if is_file(self._given):
            self._file = _checked(*read(self._given, "picture"))
        elif is_array(self._given):
            self._image = from_array(self._given)
        else:
            self._image = _plain(self._given)

    @functools.cached_property
    def digest(self) -> str:
        """The name of what was loaded: BLAKE3, in hex."""
        if self._image is None:
            return blake3(self.file()).hexdigest()
        image = self._image
        palette = image.getpalette("RGBA") if image.mode == "P" else None
        facts = (image.mode, image.size, palette, image.info.get("transparency"))
        return blake3(repr(facts).encode()).update(image.tobytes()).hexdigest()

    def file(self) -> bytes:
        """Return the picture as a file of a known kind.

        Raises:
            PictureError: It cannot be written as PNG.
        """
        if self._file is None:
            if self._image is None:
                raise RuntimeError("load the picture first")
            _ = self.digest  # must be taken from the pixels, which are released here
            self._file, self._image = _png(self._image), None
        return self._file

    def url(self) -> str:
        """Return the picture as a ``data:`` URL.

        Raises:
            PictureError: As for ``file``.
        """
        data = self.file()
        return f"data:{media_type(data)};base64,{base64.b64encode(data).decode('ascii')}"


def picture_or_url(picture: Picture) -> LocalPicture | str:
    """Return the address of a picture, or its reader if it is local.

    Args:
        picture: A string is a URL if it starts with one of the known schemes, else a path.

    Raises:
        PictureError: It is not a picture at all.
    """
    address = _address(picture)
    return LocalPicture(picture) if address is None else address


def is_picture(given: Any) -> bool:
    """Return whether it is one picture, in any form: an address or local."""
    return is_file(given) or isinstance(given, Image.Image | Media) or is_array(given)


def media_type(data: bytes) -> str | None:
    """Return the media type that the first bytes show, or None."""
    for start, name in _STARTS:
        if data.startswith(start):
            return f"image/{name}"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "image/webp"
    return "image/avif" if data[4:12] in (b"ftypavif", b"ftypavis") else None


def _address(picture: Any) -> str | None:
    if isinstance(picture, Media):
        return picture.url
    return picture if isinstance(picture, str) and picture.lower().startswith(_URL_SCHEMES) else None


def _checked(data: bytes, name: str) -> bytes:
    if media_type(data) is None:
        raise PictureError(
            f"{name} is not PNG, JPEG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000 or ICO; "
            "open it with PIL and pass the image instead"
        )
    return data


def _plain(image: Image.Image) -> Image.Image:
    try:
        return plain(image)
    except PictureError:
        raise
    except Exception as error:  # PIL may raise anything for broken lazy files
        raise PictureError(f"cannot read this {image.mode} image: {error}") from error


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    try:
        image.save(buffer, "PNG", compress_level=1)  # time matters more than size
    except Exception as error:  # for example one without pixels
        raise PictureError(f"cannot write this {image.mode} image as PNG: {error}") from error
    return buffer.getvalue()

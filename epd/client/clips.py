"""Videos and sounds in any form people have them, turned into what the chat API takes: a URL.

Files and bytes are sent unchanged in a ``data:`` URL whose media type comes from their first bytes; The server fetches
URLs, including ``file://``, which names a file on the server's host. Lives in the user's process; a
``LocalClip`` blocks, so the asynchronous client calls it in a thread.
"""

from __future__ import annotations

import base64
from typing import TypeAlias

from epd.client.errors import PictureError
from epd.client.given import File, is_file, read
from epd.multimodal import containers

__all__ = ["CLIP_FORMS", "Clip", "LocalClip", "clip_or_url"]

Clip: TypeAlias = File
"""A path, a URL (http, https, data, file), a file's bytes or an open file, of a video or a sound."""

CLIP_FORMS = "a path, a URL, bytes or an open file"

_URL_SCHEMES = ("http:", "https:", "data:", "file:")
_KINDS = {"video": containers.VIDEO, "audio": containers.AUDIO}
_NAMES = {"video": "MP4, MOV, WebM, Matroska, AVI or GIF", "audio": "WAV, FLAC, MP3, Ogg, AIFF, AU, CAF, MP4 or WebM"}
_SUBTYPES = {"matroska": "webm", "mp3": "mpeg", "avi": "x-msvideo", "au": "basic", "caf": "x-caf"}


class LocalClip:
    """A local video or sound, as it was when it was loaded.

    Args:
        modality: "video" or "audio".
        clip: Not an address.

    Raises:
        PictureError: It is not in ``CLIP_FORMS``.
    """

    def __init__(self, modality: str, clip: Clip) -> None:
        if not is_file(clip):
            raise PictureError(f"a clip must be {CLIP_FORMS}, not {type(clip).__name__}")
        self._modality, self._given = modality, clip
        self._file, self._kind = b"", ""

    def load(self) -> None:
        """Read the clip as it is now; call it before anything else.

        Raises:
            PictureError: The file is missing or unreadable, or its kind is unknown.
        """
        self._file, name = read(self._given, self._modality)
        self._kind = containers.kind_of(self._file)
        if self._kind not in _KINDS[self._modality]:
            raise PictureError(f"{name} is not {_NAMES[self._modality]}")

    def url(self) -> str:
        """Return the clip as a ``data:`` URL."""
        subtype = _SUBTYPES.get(self._kind, self._kind)
        return f"data:{self._modality}/{subtype};base64,{base64.b64encode(self._file).decode('ascii')}"


def clip_or_url(modality: str, clip: Clip) -> LocalClip | str:
    """Return the address of a clip, or its reader if it is local.

    Args:
        modality: "video" or "audio".
        clip: A string is a URL if it starts with one of the known schemes, else a path.

    Raises:
        PictureError: It is not a clip at all.
    """
    if isinstance(clip, str) and clip.lower().startswith(_URL_SCHEMES):
        return clip
    return LocalClip(modality, clip)

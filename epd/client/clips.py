"""Videos and sounds in any form people have them, turned into content parts of the chat API.

Files and bytes are sent unchanged in a ``data:`` URL whose media type comes from their first bytes; URLs are handed on
for the server to fetch. Lives in the user's process; blocks, so the asynchronous client calls it in a thread.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from epd.client.errors import PictureError
from epd.multimodal import containers

__all__ = ["Clip", "clip_part", "clip_parts", "with_clip_urls"]

Clip: TypeAlias = str | Path | bytes | bytearray | memoryview
"""A path, a URL (http, https, data, file) or a file's bytes, of a video or a sound."""

_URL_SCHEMES = ("http:", "https:", "data:", "file:")
_KINDS = {"video": containers.VIDEO, "audio": containers.AUDIO}
_NAMES = {"video": "MP4, MOV, WebM, Matroska, AVI or GIF", "audio": "WAV, FLAC, MP3, Ogg, AIFF, AU, CAF, MP4 or WebM"}
_SUBTYPES = {"matroska": "webm", "mp3": "mpeg", "avi": "x-msvideo", "au": "basic", "caf": "x-caf"}


def clip_part(modality: str, clip: Clip) -> dict[str, Any]:
    """Return the content part for a clip.

    Args:
        modality: "video" or "audio".
        clip: A string is a URL if it starts with one of the known schemes, else a path.

    Raises:
        PictureError: The file is missing or unreadable, or of no known kind.
    """
    return {"type": f"{modality}_url", f"{modality}_url": {"url": _url(modality, clip)}}


def clip_parts(videos: Sequence[Clip] | None, audios: Sequence[Clip] | None) -> list[dict[str, Any]]:
    """Return the content parts of the videos and sounds of a call.

    Raises:
        PictureError: As ``clip_part``.
        TypeError: One clip where a sequence is meant.
    """
    parts = []
    for modality, clips in (("video", videos or ()), ("audio", audios or ())):
        if isinstance(clips, str | bytes | Path):
            raise TypeError(f"{modality}s is a sequence of clips: write {modality}s=[clip]")
        parts += [clip_part(modality, clip) for clip in clips]
    return parts


def with_clip_urls(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages with ``{"type": "video", "video": clip}`` and the same of audio as URL parts.

    Raises:
        PictureError: As ``clip_part``.
    """
    return [
        {**message, "content": [_part(part) for part in message["content"]]}
        if isinstance(message.get("content"), list | tuple)
        else dict(message)
        for message in messages
    ]


def _part(part: Any) -> Any:
    modality = part.get("type") if isinstance(part, dict) else None
    if modality not in _KINDS:
        return part
    if modality not in part:
        raise PictureError(f'a content part of type "{modality}" needs its clip under the key "{modality}"')
    rest = {key: value for key, value in part.items() if key not in ("type", modality)}
    return rest | clip_part(modality, part[modality])


def _url(modality: str, clip: Clip) -> str:
    if isinstance(clip, str) and clip.lower().startswith(_URL_SCHEMES):
        return clip
    if isinstance(clip, str | Path):
        data, what = _read(modality, clip), repr(str(clip))
    elif isinstance(clip, bytes | bytearray | memoryview):
        data, what = bytes(clip), "these bytes"
    else:
        raise PictureError(f"a clip is a path, a URL or bytes, not {type(clip).__name__}")
    kind = containers.kind_of(data)
    if kind not in _KINDS[modality]:
        raise PictureError(f"{what} is not {_NAMES[modality]}" if data else f"{what} is empty")
    return f"data:{modality}/{_SUBTYPES.get(kind, kind)};base64,{base64.b64encode(data).decode('ascii')}"


def _read(modality: str, path: str | Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise PictureError(f"there is no {modality} file {str(path)!r}") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        reason = getattr(error, "strerror", None) or error
        raise PictureError(f"cannot read the {modality} file {str(path)!r}: {reason}") from error

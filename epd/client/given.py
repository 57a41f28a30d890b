"""What callers pass in, in Python's various forms: one thing or many, a path, bytes or an open file.

Lives in the user's process; ``read`` blocks, everything else is pure.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from epd.client.errors import PictureError

__all__ = ["BinaryFile", "File", "is_file", "read", "several"]


class BinaryFile(Protocol):
    """A file that is open in binary mode, or anything else that can be read in the same way."""

    def read(self) -> bytes:
        """Return the rest of it."""


File: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryFile
"""A path, a file's bytes, or an open file."""


def several(name: str, given: Any, is_one: Callable[[Any], bool], taken: str) -> list[Any]:
    """Return an argument's value as a list, whether it is one thing or any iterable of them, which is read once.

    Args:
        name: The argument's name, for the error.
        given: Its value; None is nothing.
        is_one: Whether a value is a single thing, even if it is iterable too, like text and open files.
        taken: What a single thing may be, for the error.

    Raises:
        TypeError: It is neither, or a mapping.
    """
    if given is None:
        return []
    if is_one(given):
        return [given]
    try:
        things = None if isinstance(given, Mapping) else iter(given)
    except TypeError:
        things = None
    if things is None:
        raise TypeError(f"{name} takes {taken}, or an iterable of them, not {type(given).__name__}")
    return list(things)


def is_file(given: Any) -> bool:
    """Return whether ``read`` can read it."""
    return isinstance(given, str | os.PathLike | bytes | bytearray | memoryview) or _is_open(given)


def read(given: File, kind: str) -> tuple[bytes, str]:
    """Return the content of a file, and a name for it in errors.

    An open file is read from its current position, and put back there if it can seek.

    Args:
        given: Something for which ``is_file`` is true.
        kind: What it should be, for the errors: "picture", "video" or "audio".

    Raises:
        PictureError: It does not exist, cannot be read, or is empty.
    """
    if isinstance(given, bytes | bytearray | memoryview):
        data, name = bytes(given), "these bytes"
    elif isinstance(given, str | os.PathLike):
        data, name = _read_path(given, kind), repr(os.fspath(given))
    else:
        data, name = _read_open(given, kind), "this open file"
        if not data:
            raise PictureError(f"{name} is at its end, with no {kind} left to read; seek(0) goes to its beginning")
    if not data:
        raise PictureError(f"{name} is empty")
    return data, name


def _is_open(given: Any) -> bool:
    return callable(getattr(given, "read", None))


def _read_path(path: str | os.PathLike[str], kind: str) -> bytes:
    shown = repr(os.fspath(path))
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        raise PictureError(f"there is no {kind} file {shown}") from None
    except (OSError, TypeError, ValueError) as error:  # ValueError: a path with a null byte; TypeError: one of bytes
        reason = getattr(error, "strerror", None) or error
        raise PictureError(f"cannot read the {kind} file {shown}: {reason}") from error


def _read_open(file: Any, kind: str) -> bytes:
    try:
        start = file.tell() if callable(getattr(file, "seekable", None)) and file.seekable() else None
        data = file.read()
        if start is not None:
            file.seek(start)
    except Exception as error:  # whatever the file's class raises
        raise PictureError(f"cannot read the {kind} from this open file: {error}") from error
    if not isinstance(data, bytes | bytearray | memoryview):
        raise PictureError(f"this open file gives {type(data).__name__}, not bytes: open it in binary mode")
    return bytes(data)

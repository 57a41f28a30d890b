"""A picture that is kept for later requests, and how a request holds those that it refers to.

Lives in the endpoint process; pure. The limits find kept pictures, the processor uses them, the uploads own them.
"""

from __future__ import annotations

import contextvars
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from blake3 import blake3

SCHEME = "epd-media://"


class StoredPicture:
    """A picture's file, and what vLLM's processor made of it.

    Attributes:
        file: the picture's file.
        file_digest: names it.
        pixels: what names the decoded picture, by the settings of the decoder.
        size: width and height of the decoded picture.
        key: vLLM's hash of the item, once it is processed.
        value: the processed item with its prompt updates, also from then on; `item_bytes` is its size.
    """

    def __init__(self, file: bytes) -> None:
        self.file, self.file_digest = file, blake3(file).digest()
        self.pixels: dict[str, str] = {}
        self.size = (0, 0)
        self.key = ""
        self.value: Any = None
        self.item_bytes = 0

    @property
    def num_bytes(self) -> int:
        """How much memory it takes."""
        return len(self.file) + self.item_bytes


# What `epd-media://ID` stands for in the current request; nothing else is ever looked up.
current_media: contextvars.ContextVar[Mapping[str, StoredPicture]] = contextvars.ContextVar(
    "media",
    default=MappingProxyType({}),
)

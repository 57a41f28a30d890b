"""Decompresses request bodies piece by piece, so that a small one cannot become large at once.

Lives in the endpoint process; pure.
"""

from __future__ import annotations

import zlib

_GZIP, _ZLIB, _RAW = 31, 15, -15
KNOWN = frozenset({"gzip", "x-gzip", "deflate"})


class EncodingError(ValueError):
    """A body is not encoded as its headers say."""


class Decoder:
    """Undoes one `Content-Encoding`.

    Args:
        encoding: one of `KNOWN`.
    """

    def __init__(self, encoding: str) -> None:
        self._encoding = encoding
        self._inflate: zlib._Decompress | None = None
        self._rest, self._may_have_more = b"", False

    @property
    def has_more(self) -> bool:
        """Whether there may be output without further input."""
        return bool(self._rest) or self._may_have_more

    def feed(self, data: bytes, most: int) -> bytes:
        """The output of further input, at most `most` bytes; later calls return the rest.

        Raises:
            EncodingError: the input is not in this encoding.
        """
        data, self._rest = self._rest + data, b""
        if not data and self._inflate is None:
            return b""
        if self._inflate is None or (self._inflate.eof and data):  # gzip may have several members
            self._inflate = zlib.decompressobj(self._kind_of(data))
        try:
            piece = self._inflate.decompress(data, most)
        except zlib.error as error:
            raise EncodingError(f"it is not {self._encoding}: {error}") from None
        self._rest = self._inflate.unconsumed_tail or self._inflate.unused_data
        self._may_have_more = len(piece) == most and not self._inflate.eof
        return piece

    def finish(self) -> None:
        """Ends the input.

        Raises:
            EncodingError: the end is missing.
        """
        if self._inflate is not None and not self._inflate.eof:
            raise EncodingError(f"its {self._encoding} ends too early")

    def _kind_of(self, data: bytes) -> int:
        if self._encoding != "deflate":
            return _GZIP
        return _ZLIB if data[0] & 15 == 8 else _RAW  # many clients omit zlib's header

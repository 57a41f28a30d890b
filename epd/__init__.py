"""What every EPD daemon shares, and what users import: ``from epd import Client``.

Lives in every process, so it must stay light: the client's names are loaded when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from epd.client import (
        APIError,
        AsyncClient,
        AuthenticationError,
        BadRequest,
        Chunk,
        Client,
        Clip,
        Completion,
        ConnectFailed,
        ConnectTimeout,
        EPDError,
        FirstTokenTimeout,
        Media,
        NotFound,
        Overloaded,
        Picture,
        PictureError,
        ServerError,
        StreamInterrupted,
        Timeout,
        Timeouts,
        TokenTimeout,
        TotalTimeout,
        TransportError,
        Usage,
    )

    __version__: str

__all__ = [
    "APIError",
    "AsyncClient",
    "AuthenticationError",
    "BadRequest",
    "Chunk",
    "Client",
    "Clip",
    "Completion",
    "ConnectFailed",
    "ConnectTimeout",
    "EPDError",
    "FirstTokenTimeout",
    "Media",
    "NotFound",
    "Overloaded",
    "Picture",
    "PictureError",
    "ServerError",
    "StreamInterrupted",
    "Timeout",
    "Timeouts",
    "TokenTimeout",
    "TotalTimeout",
    "TransportError",
    "Usage",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("epd")
    if name in __all__:
        import epd.client

        return getattr(epd.client, name)
    raise AttributeError(f"module 'epd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

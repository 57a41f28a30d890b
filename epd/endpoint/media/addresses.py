"""What the address of a medium may be, and the file that it carries.

Lives in the endpoint process, mostly in threads: names are resolved and files of allowed folders are read; owns
nothing. Both ways of media use it: the limits of bodies, before anything of a request is opened, and vLLM's way from
an address to a medium (`connector.py`), which also sees what no body has, such as an earlier turn of a conversation.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import socket
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from epd.config import EndpointConfig
from epd.endpoint.http.refusals import RefusedError
from epd.endpoint.media.probing import JPEG_FRAMES, check_audio, check_frames, check_image, check_video
from epd.errors import ErrorCode

_CHECKS = {"image": check_image, "video": check_video, "audio": check_audio}

Resolve = Callable[[str], list[str]]


def check_media(kind: str, url: str, config: EndpointConfig, resolve: Resolve) -> int:
    """Checks one address and, if it carries a file, the file's header.

    Returns:
        How many bytes the medium takes at most when decoded; 0 if it must be fetched to know that.

    Raises:
        RefusedError: with the reason.
    """
    if kind == "video" and (frames := frames_of(url)) is not None:
        return check_frames(frames, config)
    content = file_at(kind, url, config, resolve)
    return 0 if content is None else check_file(kind, content, config)


def check_file(kind: str, content: bytes, config: EndpointConfig) -> int:
    """Checks the header of a file; returns how many bytes it takes at most when decoded.

    Raises:
        RefusedError: with the reason.
    """
    return _CHECKS[kind](content, config)


def file_at(kind: str, url: str, config: EndpointConfig, resolve: Resolve) -> bytes | None:
    """Checks one address; returns the file that it carries or names, or None if it must be fetched.

    Raises:
        RefusedError: with the reason.
    """
    scheme = url.partition(":")[0].strip().lower()
    if scheme == "data":
        return _decoded(kind, url)
    if scheme in ("http", "https"):
        _check_host(url, config, resolve)
        return None
    if scheme == "file":
        return _read(kind, url, config)
    raise RefusedError(ErrorCode.INVALID_URL, f"media must be given as a data URL, not as {scheme[:16]!r}")


def frames_of(url: str) -> str | None:
    """The contents of a `video/jpeg` data URL: JPEG files in base64, separated by commas. None for other addresses."""
    header, _, data = url.partition(",")
    scheme, _, rest = header.partition(":")
    is_frames = scheme.strip().lower() == "data" and rest.partition(";")[0].lower() == JPEG_FRAMES
    return data if is_frames else None


def addresses_of(host: str) -> list[str]:
    """The addresses that a host name stands for; blocks."""
    return [str(found[4][0]) for found in socket.getaddrinfo(host, None, proto=socket.IPPROTO_TCP)]


def is_public(address: str) -> bool:
    """Whether an IP address is on the public Internet, not of this host or its networks."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(ip, "ipv4_mapped", None) or getattr(ip, "sixtofour", None)
    return ip.is_global and not ip.is_multicast and (mapped is None or mapped.is_global)


def _decoded(kind: str, url: str) -> bytes:
    header, found, data = url.partition(",")
    if not found or not header.endswith(";base64"):
        raise RefusedError(ErrorCode.INVALID_URL, f"a data URL must be of the form data:{kind}/...;base64,...")
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise RefusedError(ErrorCode(f"invalid_{kind}"), "the data URL is not valid base64") from None
    if not content:
        raise RefusedError(ErrorCode(f"invalid_{kind}"), "the data URL is empty")
    return content


def _check_host(url: str, config: EndpointConfig, resolve: Resolve) -> None:
    try:
        host = (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        host = ""
    if not host or any(c in url for c in "\\\r\n\t "):
        raise RefusedError(ErrorCode.INVALID_URL, "the media URL is malformed")
    if host not in [domain.lower() for domain in config.allowed_media_domains]:
        text = f"media from {host!r} is not allowed here; send a data URL (allowed_media_domains)"
        raise RefusedError(ErrorCode.URL_NOT_ALLOWED, text)
    try:
        found = resolve(host)
    except OSError as error:
        raise RefusedError(ErrorCode.URL_NOT_ALLOWED, f"{host!r} cannot be resolved: {error.strerror}") from None
    if not found or not all(is_public(address) for address in found):
        raise RefusedError(ErrorCode.URL_NOT_ALLOWED, f"{host!r} is not a public address")


def _read(kind: str, url: str, config: EndpointConfig) -> bytes:
    if not config.allowed_local_media_path:
        raise RefusedError(ErrorCode.URL_NOT_ALLOWED, "local files are not allowed here")
    allowed = Path(config.allowed_local_media_path).resolve()
    parts = urlsplit(url)
    path = Path(unquote(parts.netloc + parts.path)).resolve()
    if not path.is_relative_to(allowed):
        raise RefusedError(ErrorCode.URL_NOT_ALLOWED, "the file is outside the allowed folder")
    if not path.is_file():
        raise RefusedError(ErrorCode(f"invalid_{kind}"), "no such file")
    with path.open("rb") as file:
        content = file.read(config.max_body_bytes + 1)
    if len(content) > config.max_body_bytes:
        raise RefusedError(ErrorCode.BODY_TOO_LARGE, f"the file is larger than {config.max_body_bytes} bytes")
    return content

"""Replaces vLLM's way from an address to a medium: within the endpoint's limits, for every medium of every request.

Lives in the endpoint process, on its event loop; what blocks runs in threads (`bounds.py`). Written against vLLM 0.32:
`vllm.multimodal.media.connector`, `vllm.connections`.

Whatever a body looked like, each address is checked here before it is opened, each file before it is decoded, and each
step has a deadline. `epd-media://ID` stands for a picture that was uploaded.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NoReturn
from urllib.parse import urlsplit
from urllib.request import getproxies

import aiohttp
from aiohttp.abc import ResolveResult
from vllm import envs
from vllm.connections import HTTPConnection, MediaDownloadSizeExceededError
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.multimodal.video import get_video_loader_backend_for_processor

from epd.endpoint.http.exchange import current_exchange
from epd.endpoint.http.refusals import RefusedError
from epd.endpoint.media import addresses
from epd.endpoint.media.bounds import MediaBounds, media_timeout
from epd.endpoint.media.budget import current_share
from epd.endpoint.media.decoding import AudioIO, VideoIO
from epd.endpoint.media.pictures import LazyPicture, PictureIO
from epd.endpoint.media.probing import JPEG_FRAMES
from epd.endpoint.media.stored_picture import SCHEME, StoredPicture, current_media
from epd.errors import ErrorCode


def install(bounds: MediaBounds, is_processed: Callable[[str], bool]) -> None:
    """Makes vLLM load every medium in this process through `LimitedConnector`, also for models that take text only.

    Args:
        bounds: the endpoint's.
        is_processed: whether a picture whose pixels have this name need not be decoded any more.
    """
    LimitedConnector.bounds, PictureIO.limits = bounds, bounds.config
    bounds.is_processed = is_processed
    for name in {"http", envs.VLLM_MEDIA_CONNECTOR}:
        MEDIA_CONNECTOR_REGISTRY.register(name)(LimitedConnector)


async def close() -> None:
    """Ends the connections to hosts of media."""
    await _connection.close()


class LimitedConnector(MediaConnector):
    """A connector of vLLM that makes the checks that the module describes."""

    bounds: ClassVar[MediaBounds]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.connection = _connection

    async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> LazyPicture:
        """The picture at an address."""
        io = self._picture_io(image_mode)
        kept: StoredPicture | None = None
        with explained():
            if image_url.startswith(SCHEME):
                kept = _resolve(image_url)
                if kept.pixels.get(io.settings) is not None:  # nothing to decode or to count
                    return io.load_bytes(kept.file, kept)
                file = kept.file
            else:
                file = await self._file("image", image_url, envs.VLLM_IMAGE_FETCH_TIMEOUT)
            pixels, num_bytes = await self.bounds.run(io.look, file)
            taken = await self._take(num_bytes, decodes=not (pixels and self.bounds.is_processed(pixels)))
            picture: LazyPicture = taken(await self.bounds.run(io.load_bytes, file, kept))
            return picture

    async def fetch_video_async(
        self, video_url: str, *, image_mode: str | None = "RGB", video_processor: str | None = None
    ) -> Any:
        """The sampled frames of the video at an address, and their metadata."""
        io = self._video_io(image_mode, video_processor)
        with explained():
            frames = addresses.frames_of(video_url)
            if frames is not None:
                taken = await self._take(await self.bounds.run(io.look_at_frames, frames))
                return taken(await self.bounds.run(io.load_base64, JPEG_FRAMES, frames))
            file = await self._file("video", video_url, envs.VLLM_VIDEO_FETCH_TIMEOUT)
            taken = await self._take(await self.bounds.run(io.look, file))
            return taken(await self.bounds.run(io.load_bytes, file))

    async def fetch_audio_async(self, audio_url: str) -> Any:
        """The samples of the audio at an address, and how many there are a second."""
        io = AudioIO(self.bounds.config, **self.media_io_kwargs.get("audio", {}))
        with explained():
            file = await self._file("audio", audio_url, envs.VLLM_AUDIO_FETCH_TIMEOUT)
            taken = await self._take(await self.bounds.run(addresses.check_file, "audio", file, self.bounds.config))
            return taken(await self.bounds.run(io.load_bytes, file))

    # ---- what is not supported: ways without a deadline, and tensors

    def load_from_url(self, url: str, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses what would block the event loop."""
        _refuse("media that are loaded synchronously")

    async def load_from_url_async(self, url: str, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses any other way to media than those above."""
        _refuse("media of this kind")

    def fetch_image(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses what would block the event loop."""
        _refuse("media that are loaded synchronously")

    fetch_video = fetch_audio = fetch_image

    def fetch_image_embedding(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses embeddings."""
        _refuse("embeddings made elsewhere")

    fetch_audio_embedding = fetch_video_embedding = fetch_image_embedding

    async def fetch_image_embedding_async(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses embeddings."""
        _refuse("embeddings made elsewhere")

    fetch_audio_embedding_async = fetch_video_embedding_async = fetch_image_embedding_async

    # ---- inside

    async def _file(self, kind: str, url: str, timeout_s: float) -> bytes:
        """The file at an address, after checking it."""
        config = self.bounds.config
        content = await self.bounds.run(addresses.file_at, kind, url, config, addresses.addresses_of)
        if content is None:
            content = await self._fetch(url, timeout_s)
        return content

    async def _fetch(self, url: str, timeout_s: float) -> bytes:
        cached: bytes | None = await self.bounds.run(self._get_cached_bytes, url)
        if cached is not None:
            return cached
        config = self.bounds.config
        try:
            async with asyncio.timeout(config.media_timeout_s):
                content: bytes = await self.connection.async_get_bytes(
                    url,
                    timeout=timeout_s,
                    allow_redirects=envs.VLLM_MEDIA_URL_ALLOW_REDIRECTS,
                    max_bytes=config.max_body_bytes,
                )
        except TimeoutError:
            raise media_timeout(config) from None
        except MediaDownloadSizeExceededError as error:
            raise RefusedError(ErrorCode.MEDIA_TOO_LARGE, str(error)) from None
        except aiohttp.ClientResponseError as error:
            text = f"the media URL was answered with HTTP status {error.status}"
            raise RefusedError(ErrorCode.MEDIA_NOT_FETCHED, text) from None
        except (aiohttp.ClientError, OSError) as error:
            text = f"the media URL could not be fetched: {type(error).__name__}"
            raise RefusedError(ErrorCode.MEDIA_NOT_FETCHED, text) from None
        await self.bounds.run(self._put_cached_bytes, url, content)
        return content

    async def _take(self, num_bytes: int, decodes: bool = True) -> Callable[[Any], Any]:
        """Waits until that many bytes may be decoded; they count for the medium that is given to the result."""
        share, budget = current_share.get(), self.bounds.budget
        if share is None:
            return lambda medium: medium
        budget.ask(share, num_bytes)
        if decodes:
            ticket = object()
            await budget.take(share, id(ticket), num_bytes)
            return functools.partial(budget.settle, share, ticket)
        return lambda medium: medium

    def _picture_io(self, image_mode: str | None) -> PictureIO:
        return PictureIO(**({"image_mode": image_mode} | self.media_io_kwargs.get("image", {})))

    def _video_io(self, image_mode: str | None, video_processor: str | None) -> VideoIO:
        kwargs = dict(self.media_io_kwargs.get("video", {}))
        backend = get_video_loader_backend_for_processor(video_processor)
        if backend and "video_backend" not in kwargs:
            kwargs["video_backend"] = backend
        return VideoIO(self._picture_io(image_mode), self.bounds.config, **kwargs)


class _PublicOnly(aiohttp.TCPConnector):
    """Connects to public addresses only, whatever a name resolves to by now and wherever a redirect leads."""

    async def _resolve_host(self, host: str, port: int, traces: Any = None) -> list[ResolveResult]:
        found = await super()._resolve_host(host, port, traces)
        if host in {urlsplit(proxy).hostname for proxy in getproxies().values()}:
            return found
        if not all(addresses.is_public(each["host"]) for each in found):
            raise aiohttp.ClientConnectionError(f"{host!r} is not a public address")
        return found


class _Connection(HTTPConnection):
    """An HTTP client as vLLM's, for public addresses only."""

    _async_client: aiohttp.ClientSession | None

    async def get_async_client(self) -> aiohttp.ClientSession:
        """The client of this event loop."""
        if self._async_client is None or self._async_client.closed:
            self._async_client = aiohttp.ClientSession(
                trust_env=True, connector=_PublicOnly(), raise_for_status=_only_whole
            )
        return self._async_client

    async def close(self) -> None:
        """Ends the connections."""
        if self._async_client is not None:
            await self._async_client.close()


async def _only_whole(response: aiohttp.ClientResponse) -> None:
    """Accepts complete answers only: a redirect's own page, for example, is not a medium."""
    if response.status != 200:
        raise aiohttp.ClientResponseError(
            response.request_info, response.history, status=response.status, message=response.reason or ""
        )


_connection = _Connection()


def _refuse(what: str) -> NoReturn:
    with explained():
        raise RefusedError(ErrorCode.UNSUPPORTED, f"{what} are not supported")


@contextmanager
def explained() -> Iterator[None]:
    """Makes a refusal the answer of the current HTTP exchange, and turns it into vLLM's kind of exception."""
    try:
        yield
    except RefusedError as error:
        exchange = current_exchange.get()
        if exchange is not None:
            exchange.note(error.failure)
        raise VLLMValidationError(str(error)) from error


def _resolve(url: str) -> StoredPicture:
    kept = current_media.get().get(url.removeprefix(SCHEME))
    if kept is None:
        raise VLLMValidationError("media_not_found: no picture with this id is kept here")
    return kept

"""Media on their way through vLLM's processor: never resized and normalised again without need.

Lives in the endpoint process; owns vLLM's processor cache here, with the data in this process (vLLM's default cache
keeps it in the engine's process, of which there is none). Written against vLLM 0.32: `vllm.multimodal.media`,
`vllm.multimodal.cache`, `vllm.multimodal.processing`, `vllm.renderers.base`.

What names an entry is the content alone: a digest of a picture's decoded pixels; of a video or sound, vLLM's own hash
of the file with what was sampled of it, or of the samples. The `uuid` that clients may give to content parts is
ignored, since anyone could name another's picture by it. A picture's file that was decoded before is known by a digest
of its bytes, and is decoded again only if its processed item is gone.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, ClassVar

from blake3 import blake3
from PIL import Image
from vllm import envs
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.cache.base import (
    MultiModalCache,
    MultiModalProcessorCacheInItem,
    MultiModalProcessorCacheItem,
    MultiModalProcessorCacheOutItem,
    MultiModalProcessorOnlyCache,
)
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector, MediaWithBytes
from vllm.multimodal.media.image import ImageMediaIO
from vllm.multimodal.video import get_video_loader_backend_for_processor
from vllm.renderers import BaseRenderer

from epd.config import EndpointConfig
from epd.endpoint.http.exchange import current_exchange
from epd.endpoint.http.refusals import RefusedError
from epd.endpoint.media import repeats
from epd.endpoint.media.decoding import AudioIO, VideoIO, settle_resampling
from epd.endpoint.media.probing import check_image
from epd.endpoint.media.stored_picture import SCHEME, StoredPicture, current_media

_KNOWN_FILES = 65_536


class LazyPicture(MediaWithBytes[Image.Image]):
    """A picture whose pixels are decoded when somebody looks at them; `pixels` names them before that."""

    def __init__(
        self, io: ImageMediaIO, file: bytes, pixels: str, kept: StoredPicture | None, media: Image.Image | None
    ) -> None:
        self._io, self._media = io, media
        self.original_bytes, self.io_config = file, None
        self.pixels, self.kept = pixels, kept

    @property
    def media(self) -> Image.Image:
        """The decoded picture, by vLLM's own decoder."""
        if self._media is None:
            self._media = ImageMediaIO.load_bytes(self._io, self.original_bytes).media
        return self._media


class PictureIO(ImageMediaIO):
    """VLLM's decoder, which remembers what each file's pixels are called."""

    limits: ClassVar[EndpointConfig] = EndpointConfig()
    _known: ClassVar[OrderedDict[tuple[bytes, str], str]] = OrderedDict()
    _lock = threading.Lock()

    @property
    def settings(self) -> str:
        """What makes the pixels of one file differ."""
        return repr((self.image_mode, self.rgba_background_color, sorted(self.kwargs.items())))

    def get_max_bytes(self) -> int:
        """The largest file that is fetched."""
        return self.limits.max_body_bytes

    def load_bytes(self, data: bytes, kept: StoredPicture | None = None) -> LazyPicture:
        """A picture; decoded now only if it was never decoded before.

        Raises:
            RefusedError: it is no picture, or too large.
            ValueError: it cannot be decoded.
        """
        settings = self.settings
        digest = blake3(data).digest() if kept is None else kept.file_digest
        pixels = self._find(digest, settings) if kept is None else kept.pixels.get(settings)
        media = None
        if pixels is None:
            check_image(data, self.limits)  # it may have been fetched, and nobody has looked at it yet
            media = super().load_bytes(data).media
            pixels = _pixels_digest(media)
            self._remember(digest, settings, pixels)
            if kept is not None:
                kept.pixels[settings], kept.size = pixels, media.size
        return LazyPicture(self, data, pixels, kept, media)

    def _find(self, digest: bytes, settings: str) -> str | None:
        with self._lock:
            pixels = self._known.get((digest, settings))
            if pixels is not None:
                self._known.move_to_end((digest, settings))
            return pixels

    def _remember(self, digest: bytes, settings: str, pixels: str) -> None:
        with self._lock:
            self._known[digest, settings] = pixels
            while len(self._known) > _KNOWN_FILES:
                self._known.popitem(last=False)


class LimitedConnector(MediaConnector):
    """VLLM's way from an address to a medium, within limits, which also knows `epd-media://ID` for pictures.

    `limits` are those of the endpoint in this process.
    """

    limits: ClassVar[EndpointConfig] = EndpointConfig()

    def fetch_image(self, image_url: str, *, image_mode: str | None = "RGB") -> Any:
        """The picture at an address."""
        io = self._io(image_mode)
        if image_url.startswith(SCHEME):
            kept = _resolve(image_url)
            return io.load_bytes(kept.file, kept)
        with _explained():
            return self.load_from_url(image_url, io, fetch_timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT)

    async def fetch_image_async(self, image_url: str, *, image_mode: str | None = "RGB") -> Any:
        """The picture at an address; what takes long is done in vLLM's threads."""
        io = self._io(image_mode)
        if not image_url.startswith(SCHEME):
            with _explained():
                return await self.load_from_url_async(image_url, io, fetch_timeout=envs.VLLM_IMAGE_FETCH_TIMEOUT)
        kept = _resolve(image_url)
        if kept.pixels.get(io.settings) is None:
            return await asyncio.to_thread(io.load_bytes, kept.file, kept)
        return io.load_bytes(kept.file, kept)

    def fetch_video(self, video_url: str, *, image_mode: str | None = "RGB", video_processor: str | None = None) -> Any:
        """The sampled frames of the video at an address, and their metadata."""
        io = self._video_io(image_mode, video_processor)
        with _explained():
            return self.load_from_url(video_url, io, fetch_timeout=envs.VLLM_VIDEO_FETCH_TIMEOUT)

    async def fetch_video_async(
        self, video_url: str, *, image_mode: str | None = "RGB", video_processor: str | None = None
    ) -> Any:
        """The same, decoded in vLLM's threads."""
        io = self._video_io(image_mode, video_processor)
        with _explained():
            return await self.load_from_url_async(video_url, io, fetch_timeout=envs.VLLM_VIDEO_FETCH_TIMEOUT)

    def fetch_audio(self, audio_url: str) -> Any:
        """The samples of the audio at an address, and how many there are a second."""
        io = AudioIO(self.limits, **self.media_io_kwargs.get("audio", {}))
        with _explained():
            return self.load_from_url(audio_url, io, fetch_timeout=envs.VLLM_AUDIO_FETCH_TIMEOUT)

    async def fetch_audio_async(self, audio_url: str) -> Any:
        """The same, decoded in vLLM's threads."""
        io = AudioIO(self.limits, **self.media_io_kwargs.get("audio", {}))
        with _explained():
            return await self.load_from_url_async(audio_url, io, fetch_timeout=envs.VLLM_AUDIO_FETCH_TIMEOUT)

    def _io(self, image_mode: str | None) -> PictureIO:
        return PictureIO(**({"image_mode": image_mode} | self.media_io_kwargs.get("image", {})))

    def _video_io(self, image_mode: str | None, video_processor: str | None) -> VideoIO:
        kwargs = dict(self.media_io_kwargs.get("video", {}))
        backend = get_video_loader_backend_for_processor(video_processor)
        if backend and "video_backend" not in kwargs:
            kwargs["video_backend"] = backend
        return VideoIO(self._io(image_mode), self.limits, **kwargs)


class ProcessorCache(MultiModalProcessorOnlyCache):
    """VLLM's processor cache with the data here; also answers for kept pictures, whatever has left the cache.

    Used in the renderer's one thread for processing, where `begin` starts a request; `find` is for any thread.
    """

    def __init__(self, config: VllmConfig) -> None:
        super().__init__(config.model_config)
        self._local = threading.local()

    def find(self, item: object) -> tuple[str, MultiModalProcessorCacheItem] | None:
        """The hash and the value of a kept picture, for a request without settings of its own.

        Without them a picture's hash is what names its pixels.
        """
        if not isinstance(item, LazyPicture) or item.kept is None:
            return None
        value = item.kept.value
        return (item.pixels, value) if value is not None and item.kept.key == item.pixels else None

    def begin(self, kept: dict[str, StoredPicture]) -> None:
        """A request with these kept pictures, by their hashes, asks next."""
        self._local.kept = kept
        self._local.held = {key: each.value for key, each in kept.items() if each.value is not None}

    def is_cached_item(self, mm_hash: str) -> bool:
        """Whether it is here; it then stays until this request has got it."""
        held = self._held()
        if mm_hash in held:
            return True
        value = self._cache.get(mm_hash)
        if value is None:
            return False
        held[mm_hash] = value
        return True

    def get_and_update_item(
        self, mm_item: MultiModalProcessorCacheInItem, mm_hash: str
    ) -> MultiModalProcessorCacheOutItem:
        """The item and its prompt updates: those that are here, else the given ones, which then are here."""
        value = self._held().get(mm_hash)
        if value is None:
            assert mm_item is not None
            value = MultiModalProcessorCacheItem(*mm_item)
            self.cache_if_fits(self._cache, mm_hash, value)
        kept = getattr(self._local, "kept", {}).get(mm_hash)
        if kept is not None and kept.value is None:
            kept.key, kept.value = mm_hash, value
            kept.item_bytes = int(MultiModalCache.get_item_size(value))
        return value.item, value.prompt_updates

    def _held(self) -> dict[str, MultiModalProcessorCacheItem]:
        if not hasattr(self._local, "held"):
            self._local.held = {}
        held: dict[str, MultiModalProcessorCacheItem] = self._local.held
        return held


def install(renderer: BaseRenderer[Any], config: VllmConfig, limits: EndpointConfig) -> ProcessorCache | None:
    """Makes `renderer` use all this; None for a model that takes text only."""
    if renderer.mm_processor is None:
        return None
    LimitedConnector.limits = PictureIO.limits = limits
    MEDIA_CONNECTOR_REGISTRY.register("http")(LimitedConnector)
    cache = ProcessorCache(config)
    renderer._mm_processor_cache = renderer._mm_processor_only_cache = cache
    processor = renderer.mm_processor
    settle_resampling(processor)
    vllm_hashes = processor._get_mm_hashes

    def hashes(inputs: Any) -> Any:
        """Names each item by its content; this is the one place where vLLM would take a client's word for it."""
        items = {modality: each.get_all_items_for_hash() for modality, each in inputs.mm_data_items.items()}
        found = vllm_hashes(replace(inputs, mm_uuid_items=_names(items)))
        kept: dict[str, StoredPicture] = {}
        for modality, each in items.items():
            for item, key in zip(each, found[modality], strict=True):
                if isinstance(item, LazyPicture) and item.kept is not None and item.kept.key in ("", key):
                    kept[key] = item.kept
        cache.begin(kept)
        return found

    def no_uuids(data: Any, items: Any, _uuids: object, _request_id: str) -> Any:
        """What clients call their items is dropped here already; vLLM's own check would decode them, too."""
        renderer._validate_mm_uuids(data, items, {})
        return {}

    processor._get_mm_hashes, renderer._process_mm_uuids = hashes, no_uuids
    repeats.install(renderer, cache.find)
    return cache


def _names(items: Mapping[str, Sequence[object]]) -> dict[str, list[str | None]]:
    if any(item is None for each in items.values() for item in each):
        raise VLLMValidationError("media must bring their data; a uuid alone names nothing here")
    return {
        modality: [item.pixels if isinstance(item, LazyPicture) else None for item in each]
        for modality, each in items.items()
    }


@contextmanager
def _explained() -> Iterator[None]:
    """A refusal becomes the answer of the HTTP exchange that it is in, and vLLM's kind of exception."""
    try:
        yield
    except RefusedError as error:
        exchange = current_exchange.get()
        if exchange is not None:
            exchange.failure = error.failure
        raise VLLMValidationError(str(error)) from error


def _resolve(url: str) -> StoredPicture:
    kept = current_media.get().get(url.removeprefix(SCHEME))
    if kept is None:
        raise VLLMValidationError("media_not_found: no picture of this id is kept here")
    return kept


def _pixels_digest(image: Image.Image) -> str:
    palette = image.palette.palette if image.palette is not None else b""
    hasher = blake3(repr((image.mode, image.size, bytes(palette), image.info.get("transparency"))).encode())
    hasher.update(image.tobytes())
    return str(hasher.hexdigest())

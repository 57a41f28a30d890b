"""Media on their way through vLLM's processor: none is resized and normalised again without need.

Lives in the endpoint process; owns vLLM's processor cache here, with the data in this process (vLLM's default cache
keeps it in the engine's process, of which there is none). Written against vLLM 0.32: `vllm.multimodal.media`,
`vllm.multimodal.cache`, `vllm.multimodal.processing`, `vllm.renderers.base`.

Entries are named by content alone: a picture by a digest of its decoded pixels; a video or sound by vLLM's own hash of
the file and what was sampled of it, or of the samples. The `uuid` that clients may give to content parts is ignored,
since anyone could name another's picture with it.

The processor only ever gets what this process has decoded: processors open paths and addresses by themselves.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.cache.base import (
    MultiModalCache,
    MultiModalProcessorCacheInItem,
    MultiModalProcessorCacheItem,
    MultiModalProcessorCacheOutItem,
    MultiModalProcessorOnlyCache,
)
from vllm.multimodal.media import MediaWithBytes
from vllm.renderers import BaseRenderer

from epd.endpoint.http.exchange import current_exchange
from epd.endpoint.http.refusals import RefusedError
from epd.endpoint.media import connector, repeats
from epd.endpoint.media.bounds import MediaBounds
from epd.endpoint.media.budget import current_share
from epd.endpoint.media.decoding import settle_resampling
from epd.endpoint.media.own_options import check_options
from epd.endpoint.media.pictures import LazyPicture
from epd.endpoint.media.stored_picture import StoredPicture
from epd.errors import ErrorCode
from epd.multimodal.item_shapes import ItemShapes
from epd.multimodal.rules import UnsupportedItemError

# If a request's media took this much, the C library is asked to return freed memory to the system.
_TRIM_BYTES = 32 << 20


class ProcessorCache(MultiModalProcessorOnlyCache):
    """The processor cache of vLLM, with the data here; also answers for kept pictures, whatever has left the cache.

    Used in one thread at a time, where `begin` starts a request: a thread that was given up over an earlier request
    must not come back to it. `find` and `has` may be called in any thread.
    """

    def __init__(self, config: VllmConfig) -> None:
        super().__init__(config.model_config)
        self._local = threading.local()
        self._thread = 0

    def has(self, key: str) -> bool:
        """Whether the item with this hash is here by now."""
        return key in self._cache

    def find(self, item: object) -> tuple[str, MultiModalProcessorCacheItem] | None:
        """The hash and the value of a kept picture, for a request without its own settings.

        Without such settings, a picture's hash is the name of its pixels.
        """
        if not isinstance(item, LazyPicture) or item.kept is None:
            return None
        value = item.kept.value
        return (item.pixels, value) if value is not None and item.kept.key == item.pixels else None

    def begin(self, kept: dict[str, StoredPicture]) -> None:
        """Starts a request that refers to these kept pictures, by hash."""
        self._thread = threading.get_ident()
        self._local.kept = kept
        self._local.held = {key: each.value for key, each in kept.items() if each.value is not None}

    def is_cached_item(self, mm_hash: str) -> bool:
        """Whether an item is here; if so, it stays until this request has got it."""
        self._check_thread()
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
        """The item and its prompt updates: the cached ones, or else the given ones, which are then cached."""
        self._check_thread()
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

    def _check_thread(self) -> None:
        if self._thread != threading.get_ident():
            raise RuntimeError("this request was given up")

    def _held(self) -> dict[str, MultiModalProcessorCacheItem]:
        if not hasattr(self._local, "held"):
            self._local.held = {}
        held: dict[str, MultiModalProcessorCacheItem] = self._local.held
        return held


def install(renderer: BaseRenderer[Any], config: VllmConfig, bounds: MediaBounds) -> ProcessorCache | None:
    """Makes `renderer` use this cache; None for a model that takes text only."""
    if renderer.mm_processor is None:
        connector.install(bounds, lambda _: False)
        return None
    cache = ProcessorCache(config)
    connector.install(bounds, cache.has)
    renderer._mm_processor_cache = renderer._mm_processor_only_cache = cache
    processor = renderer.mm_processor
    settle_resampling(processor)
    vllm_hashes = processor._get_mm_hashes

    def hashes(inputs: Any) -> Any:
        """Names each item by its content; this is the only place where vLLM would trust a client's name."""
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
        """Drops clients' names of items here already; vLLM's own check would decode the items."""
        renderer._validate_mm_uuids(data, items, {})
        return {}

    processor._get_mm_hashes, renderer._process_mm_uuids = hashes, no_uuids
    shapes = functools.cache(lambda: ItemShapes.of(config))
    _bound(renderer, bounds, shapes, lambda: repeats.install(renderer, cache.find))
    return cache


def _bound(
    renderer: BaseRenderer[Any], bounds: MediaBounds, shapes: Callable[[], ItemShapes], shorten: Callable[[], None]
) -> None:
    """Makes `renderer` process media within `bounds`; `shorten` gives it a shorter way for some of them.

    If a request has its own options, the result must have the model's `shapes`, or is refused.
    """

    def check_shapes(items: Any) -> None:
        try:
            shapes().check(items)
        except UnsupportedItemError as error:
            raise RefusedError(ErrorCode.INVALID_REQUEST, f"mm_processor_kwargs: {error}") from None

    async def in_a_thread(*args: Any, **options: Any) -> Any:
        return await bounds.process(functools.partial(renderer._process_multimodal, *args, **options))

    renderer._process_multimodal_async = in_a_thread
    shorten()
    way, usual = renderer._process_multimodal_async, renderer.model_config.get_multimodal_config().mm_processor_kwargs

    async def process(prompt: list[int], data: Any, *args: Any, **options: Any) -> Any:
        """Returns vLLM's own result; afterwards nothing that was decoded is held any more."""
        exchange, asked = current_exchange.get(), options.get("mm_processor_kwargs")
        has_own_options = bool(asked) and asked != usual
        if exchange is not None:
            exchange.has_own_options |= has_own_options
        with connector.explained():
            try:
                check_decoded(data)
                if has_own_options:
                    check_options(asked, bounds.config)
                result = await way(prompt, data, *args, **options)
                if has_own_options:
                    await bounds.process(check_shapes, result["mm_kwargs"])
                return result
            finally:
                if _give_back(data, bounds) >= _TRIM_BYTES:
                    await bounds.run(trim_memory)

    renderer._process_multimodal_async = process


def check_decoded(data: Mapping[str, Any]) -> None:
    """Checks that all media of a request are pixels and samples.

    Raises:
        RefusedError: there is something else, such as a path or an address.
    """
    for modality, items in data.items():
        for item in items if isinstance(items, list) else [items]:
            if item is not None and not _is_decoded(item):
                text = f"{modality} input of type {type(item).__name__} is not supported"
                raise RefusedError(ErrorCode.UNSUPPORTED, text)


def _is_decoded(item: Any) -> bool:
    if isinstance(item, MediaWithBytes | Image.Image | np.ndarray):
        return True
    if isinstance(item, tuple):  # samples and their rate, or frames and their metadata
        return bool(item) and _is_decoded(item[0]) and not any(isinstance(each, str | bytes) for each in item[1:])
    if isinstance(item, list):  # frames
        return bool(item) and all(map(_is_decoded, item))
    if isinstance(item, dict):  # a chunk of a video or a picture, for models that take both as one
        media = [item[key] for key in ("image", "video_chunk") if key in item]
        return len(media) == 1 and _is_decoded(media[0])
    return False


def _give_back(data: Mapping[str, Any], bounds: MediaBounds) -> int:
    """Releases what was decoded for a request; returns how many bytes that was."""
    share, num_bytes = current_share.get(), 0
    for items in data.values():
        for item in items if isinstance(items, list) else [items]:
            if share is not None:
                num_bytes += bounds.budget.give_back(share, id(item))
            if isinstance(item, LazyPicture):
                item.let_go()
    return num_bytes


def trim_memory() -> None:
    """Makes the C library return freed memory to the system; does nothing if it is not glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _names(items: Mapping[str, Sequence[object]]) -> dict[str, list[str | None]]:
    if any(item is None for each in items.values() for item in each):
        raise VLLMValidationError("media must bring their data; a uuid alone names nothing here")
    return {
        modality: [item.pixels if isinstance(item, LazyPicture) else None for item in each]
        for modality, each in items.items()
    }

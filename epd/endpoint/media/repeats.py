"""Pictures that were processed before: their tokens are put into the prompt at once, and nothing else is done.

Lives in the endpoint process, on its event loop; owns nothing. For each request with media, vLLM runs all the steps for
new items in a thread, even if there are none. Here only the last step is left, done by vLLM's own code. Written against
vLLM 0.32 (`vllm.renderers.base`, `vllm.multimodal.processing.processor`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from vllm.inputs.engine import mm_input
from vllm.multimodal.inputs import MultiModalKwargsItems
from vllm.multimodal.processing.processor import BaseMultiModalProcessor, MultiModalProcessingResult
from vllm.renderers import BaseRenderer

# Longer prompts are searched in vLLM's thread, as without this module.
_MAX_TOKENS = 4096
# A processor that overrides one of these may do more than is done here.
_STEPS = ("apply", "_cached_apply_hf_processor", "_merge_mm_kwargs")

Find = Callable[[Any], Any]


def install(renderer: BaseRenderer[Any], find: Find) -> None:
    """Makes `renderer` take the short way where it can.

    Args:
        renderer: vLLM's, with a multimodal processor.
        find: from an item of a request without its own settings to the result that it gave before, or None.
    """
    processor, vllm_way = renderer.mm_processor, renderer._process_multimodal_async
    if any(getattr(type(processor), step) is not getattr(BaseMultiModalProcessor, step) for step in _STEPS):
        return

    async def process(prompt: list[int], data: Any, **options: Any) -> Any:
        """Returns the same result as vLLM's."""
        asked = any(options.get(name) for name in ("mm_processor_kwargs", "media_io_kwargs", "skip_mm_cache"))
        if not asked and len(prompt) <= _MAX_TOKENS and [*data] == ["image"] and isinstance(data["image"], list):
            values = [find(item) for item in data["image"]]
            if None not in values:
                return _applied(processor, prompt, data, values)
        return await vllm_way(prompt, data, **options)

    renderer._process_multimodal_async = process


def _applied(processor: Any, prompt: list[int], data: Any, found: Sequence[tuple[str, Any]]) -> Any:
    """The prompt with the tokens of its pictures; `found` are their hashes and processed items."""
    items = processor.info.parse_mm_data(data)
    updates = [
        [processor._recompute_cached_prompt_update(update, number) for update in value.prompt_updates]
        for number, (_, value) in enumerate(found)
    ]
    result = MultiModalProcessingResult(
        prompt_ids=processor._postprocess_prompt(prompt),
        kwargs=MultiModalKwargsItems({"image": [value.item for _, value in found]}),
        hashes={"image": [key for key, _ in found]},
        prompt_updates={"image": updates},
    )
    token_ids, places = processor._maybe_apply_prompt_updates(items, result)
    ranges = {modality: [place.to_range() for place in each] for modality, each in places.items()}
    return mm_input(token_ids, result.kwargs, result.hashes, ranges)

"""Run by test_mrope_engine.py in a process of its own: a real prefill engine of an M-RoPE model, and one video.

`python -m tests.workers.mrope_engine FAMILY FOLDER`; makes the model, and prints one JSON object: what the engine
refused, held and computed.
"""

from __future__ import annotations

import json
import secrets
import sys
import time
from pathlib import Path
from typing import Any

import torch
from vllm import SamplingParams
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFeatureSpec,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    PlaceholderRange,
)
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.serial_utils import MsgpackEncoder

from cache.pools import create, open_view
from cache.slot import slot_bytes
from cache.tensors import tensor_bytes
from epd.config import Config, PrefillConfig
from epd.messages import Slot, Stage
from epd.multimodal.item_identifiers import identifier_of
from epd.multimodal.positions import PositionsError
from tests.models.registry import FAMILIES
from workers.engine import Engine

GRID, TOKENS_PER_GRID, LEAD, TAIL = (4, 4, 6), 6, 20, 30


def metadata(*grid: int) -> MultiModalKwargsItem:
    """What a video's positions are computed from."""
    return MultiModalKwargsItem(
        {"video_grid_thw": MultiModalFieldElem(torch.tensor(grid), MultiModalBatchedField(keep_on_cpu=True))}
    )


class Bench:
    """An engine, a pool with the embeddings of the video's temporal grids, and requests about it."""

    def __init__(self, family: str, folder: str) -> None:
        folder = str(FAMILIES[family].folder(Path(folder), family))
        self.framed = family == "qwen3_vl"
        config = Config(
            model=folder,
            engine={"max_model_len": 512, "dtype": "bfloat16"},
            prefill=PrefillConfig(min_overlap_tokens=16, engine={"enable_prefix_caching": False}),
        )
        self.engine = Engine(config, Stage.PREFILL, "prefill-test")
        hf = self.engine.vllm_config.model_config.hf_config
        self._pad, self._start, self._end = hf.video_token_id, hf.vision_start_token_id, hf.vision_end_token_id
        width = hf.text_config.hidden_size * (1 + len(getattr(hf.vision_config, "deepstack_visual_indexes", ())))
        self.owner = create("shared_memory", secrets.token_hex(4), 1 << 20, True)
        pool = self.owner.descriptor()
        self.engine.connector.set_pools([pool])
        nbytes, view = slot_bytes(TOKENS_PER_GRID, width, "bfloat16"), open_view(pool)
        self.slots = {}
        torch.manual_seed(0)
        for i in range(GRID[0]):
            slot = Slot(
                pool_id=pool.pool_id, offset=i * nbytes, nbytes=nbytes, generation=i + 1, num_tokens=TOKENS_PER_GRID,
                width=width, dtype="bfloat16",
            )  # fmt: skip
            view.write(slot, tensor_bytes(torch.randn(TOKENS_PER_GRID, width, dtype=torch.bfloat16)), "test")
            self.slots[f"grid{i}"] = slot

    def prompt(self) -> tuple[list[int], PlaceholderRange]:
        """Text, the video, and text, and where the video is."""
        if self.framed:
            inside = [9, self._start, *[self._pad] * TOKENS_PER_GRID, self._end] * GRID[0]
        else:
            inside = [self._pad] * TOKENS_PER_GRID * GRID[0]
        mask = torch.tensor([token == self._pad for token in inside])
        lead = [20 + i for i in range(LEAD)]
        if not self.framed:
            lead[-1] = self._start
        ids = [*lead, *inside, *([] if self.framed else [self._end]), *(60 + i for i in range(TAIL))]
        return ids, PlaceholderRange(LEAD, len(inside), None if mask.all() else mask)

    def add(self, request_id: str, features: list[MultiModalFeatureSpec], ids: list[int]) -> None:
        """Queues a request."""
        made = EngineCoreRequest(
            request_id=request_id, prompt_token_ids=ids, mm_features=features,
            sampling_params=SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1), pooling_params=None,
            arrival_time=time.time(), lora_request=None, cache_salt=None, data_parallel_rank=None,
        )  # fmt: skip
        self.engine.add_prefill(request_id, [bytes(frame) for frame in MsgpackEncoder().encode(made)])

    def whole(self, request_id: str, data: Any) -> None:
        """Queues a request with the video as one item."""
        ids, place = self.prompt()
        name = identifier_of(list(self.slots))
        self.add(request_id, [MultiModalFeatureSpec(data, "video", name, place, name)], ids)

    def ready(self, *names: str) -> None:
        """Announces patches."""
        for name in names:
            self.engine.connector.patch_ready(name, self.slots[name])

    def run(self, request_id: str) -> torch.Tensor:
        """Steps until the request is finished; returns the log-probabilities of its prompt."""
        for _ in range(20):
            for output in self.engine.step()[0]:
                if output.request_id == request_id and output.finished:
                    self.engine.connector.forget(request_id)
                    return output.new_prompt_logprobs_tensors.logprobs[:, 0]
        raise AssertionError(f"{request_id} did not finish")

    def computed(self, request_id: str) -> int:
        """How many tokens of a request's prompt have been prefilled."""
        return int(self.engine.scheduler.requests[request_id].num_computed_tokens)


def main() -> None:
    bench = Bench(*sys.argv[1:])
    told: dict[str, Any] = {"bytes": bench.engine.parameter_bytes(), "refused": []}
    for data in (None, metadata(4, 6, 6), metadata(4, 4)):
        try:
            bench.whole("bad", data)
        except PositionsError as error:
            told["refused"].append(str(error))
    told["after refusals"] = bench.engine.has_requests()

    bench.whole("late", metadata(*GRID))
    bench.ready("grid0", "grid1", "grid3")
    told["three of four"] = [bench.engine.step()[1], bench.computed("late")]
    told["still three"] = [bench.engine.step()[1], bench.computed("late")]
    bench.ready("grid2")
    late = bench.run("late")
    bench.whole("whole", metadata(*GRID))
    bench.ready(*bench.slots)
    whole = bench.run("whole")
    told["late"] = (late - whole).abs().max().item()
    bench.whole("turned", metadata(4, 6, 4))
    bench.ready(*bench.slots)
    told["turned"] = (bench.run("turned") - whole).abs().max().item()

    if not bench.framed:
        ids, place = bench.prompt()
        places = [PlaceholderRange(place.offset + i * TOKENS_PER_GRID, TOKENS_PER_GRID) for i in range(GRID[0])]
        pieces = [
            MultiModalFeatureSpec(metadata(1, *GRID[1:]), "video", name, at, name)
            for name, at in zip(bench.slots, places, strict=True)
        ]
        bench.add("pieces", pieces, ids)
        bench.ready(*bench.slots)
        told["pieces"] = (bench.run("pieces") - whole).abs().max().item()
    bench.engine.step()
    runner = bench.engine.core.model_executor.driver_worker.worker.model_runner
    told["held"] = [
        len(runner.encoder_cache),
        bench.engine.connector.num_held,
        len(bench.engine.scheduler.encoder_cache_manager.cached),
    ]
    print(json.dumps(told), flush=True)
    bench.owner.close()


if __name__ == "__main__":
    main()

"""Run by test_prefill_engine.py in a process of its own: a real prefill engine, a real pool, patches that come late.

Prints one JSON object: what the engine held and computed at each point.
"""

from __future__ import annotations

import json
import secrets
import time

import torch
from vllm import SamplingParams
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.serial_utils import MsgpackEncoder

from cache.pools import create, open_view
from cache.slot import slot_bytes
from cache.tensors import tensor_bytes
from epd.builtin import model_path
from epd.config import Config, PrefillConfig
from epd.messages import Slot, Stage
from workers.engine import Engine

NUM_PATCHES, PATCH_TOKENS, WIDTH, GAP = 8, 4, 128, 12


def main() -> None:
    config = Config(
        model=str(model_path()),
        engine={"max_model_len": 512, "dtype": "bfloat16"},
        prefill=PrefillConfig(min_overlap_tokens=32, engine={"enable_prefix_caching": False}),
    )
    engine = Engine(config, Stage.PREFILL, "prefill-test")
    owner = create("shared_memory", secrets.token_hex(4), 1 << 20, True)
    view = open_view(owner.descriptor())
    engine.connector.set_pools([owner.descriptor()])
    nbytes = slot_bytes(PATCH_TOKENS, WIDTH, "bfloat16")
    torch.manual_seed(0)
    slots = {}
    for i in range(NUM_PATCHES):
        slot = Slot(
            pool_id=owner.descriptor().pool_id, offset=i * nbytes, nbytes=nbytes, generation=i + 1,
            num_tokens=PATCH_TOKENS, width=WIDTH, dtype="bfloat16",
        )  # fmt: skip
        view.write(slot, tensor_bytes(torch.randn(PATCH_TOKENS, WIDTH, dtype=torch.bfloat16)), "test")
        slots[f"patch{i}"] = slot
    told: dict[str, object] = {}

    def request(request_id: str) -> list[bytes]:
        """Eight patches, each after twelve tokens of text, and text at the end."""
        ids: list[int] = []
        features = []
        for name in slots:
            ids += [100 + len(ids) % 50] * GAP
            place = PlaceholderRange(offset=len(ids), length=PATCH_TOKENS)
            features.append(MultiModalFeatureSpec(data=None, modality="image", identifier=name, mm_position=place))
            ids += [4] * PATCH_TOKENS
        ids += [200] * GAP
        made = EngineCoreRequest(
            request_id=request_id, prompt_token_ids=ids, mm_features=features,
            sampling_params=SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1), pooling_params=None,
            arrival_time=time.time(), lora_request=None, cache_salt=None, data_parallel_rank=None,
        )  # fmt: skip
        return [bytes(frame) for frame in MsgpackEncoder().encode(made)]

    def run(request_id: str, steps: int = 20) -> list[float]:
        """Steps until the request is finished; returns its prompt log-probabilities."""
        for _ in range(steps):
            for output in engine.step()[0]:
                if output.request_id == request_id and output.finished:
                    engine.connector.forget(request_id)
                    tensors = output.new_prompt_logprobs_tensors
                    return [round(value, 3) for value in tensors.logprobs[:, 0].tolist()]
        return []

    def computed(request_id: str) -> int:
        return int(engine.scheduler.requests[request_id].num_computed_tokens)

    engine.add_prefill("late", request("r"))
    told["before any patch"] = [engine.step()[1], computed("late")]
    for name in list(slots)[:3]:
        engine.connector.patch_ready(name, slots[name])
    told["with three patches"] = [engine.step()[1], computed("late")]
    told["and nothing new"] = [engine.step()[1], computed("late")]
    for name in list(slots)[3:]:
        engine.connector.patch_ready(name, slots[name])
    late = run("late")
    engine.add_prefill("whole", request("r"))
    for name, slot in slots.items():
        engine.connector.patch_ready(name, slot)
    whole = run("whole")
    told["log-probabilities"] = [len(late), late == whole]
    engine.step()
    runner = engine.core.model_executor.driver_worker.worker.model_runner
    told["held"] = [
        len(runner.encoder_cache),
        engine.connector.num_held,
        len(engine.scheduler.encoder_cache_manager.cached),
    ]
    print(json.dumps(told), flush=True)
    owner.close()


if __name__ == "__main__":
    main()

"""Run by test_encode_engine.py in a process of its own: a real encode stage, and items that its encoder cannot take.

Prints one JSON object: what came of each batch of jobs.
"""

from __future__ import annotations

import json
import secrets
import time
from typing import Any

from PIL import Image
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.multimodal.processing import ProcessorInputs, TimingContext
from vllm.v1.serial_utils import MsgpackEncoder

from benchmarks.servers import DTYPE
from cache.pools import create
from cache.slot import slot_bytes
from epd.builtin import model_path
from epd.config import Config
from epd.messages import Encode, Encoded, EncodeFailed, EncodeJob, Slot
from workers.encode import EncodeStage

TOKENS, WIDTH = 68, 128  # a picture is 17 tiles of 4
SMALL = {"max_image_size": {"longest_edge": 32}, "size": {"longest_edge": 32}}
LARGE = {"max_image_size": {"longest_edge": 128}, "size": {"longest_edge": 128}}


def main() -> None:
    config = Config(model=str(model_path()), engine={"max_model_len": 512, "dtype": DTYPE})
    said: list[Any] = []
    stage = EncodeStage(config, "encode-test", lambda message, _: said.append(message), lambda call, *args: call(*args))
    stage.start()
    owner = create("shared_memory", secrets.token_hex(4), 1 << 20, True)
    stage.set_pools([owner.descriptor()])
    processor = MULTIMODAL_REGISTRY.create_processor(stage.engine.vllm_config.model_config)
    encoder, nbytes, number = MsgpackEncoder(), slot_bytes(TOKENS, WIDTH, DTYPE), 0

    def item(shade: int, **options: Any) -> MultiModalKwargsItem:
        """A picture, as the processor makes it with these options."""
        data = processor.info.parse_mm_data({"image": [Image.new("RGB", (64, 64), (shade, 9, 9))]})
        text = processor.info.ctx.tokenizer.encode("<image>", add_special_tokens=False)
        done = processor.apply(
            ProcessorInputs(text, data, hf_processor_mm_kwargs=options), timing_ctx=TimingContext(enabled=False)
        )
        found: MultiModalKwargsItem = done["mm_kwargs"]["image"][0]
        return found

    def run(*items: MultiModalKwargsItem, num_tokens: int = TOKENS) -> list[str]:
        """What comes of a batch of jobs, in their order."""
        nonlocal number
        jobs, frames = [], []
        for each in items:
            number += 1
            slot = Slot(
                pool_id=owner.descriptor().pool_id, offset=number * nbytes, nbytes=nbytes, generation=number,
                num_tokens=num_tokens, width=WIDTH, dtype=DTYPE,
            )  # fmt: skip
            own = [bytes(frame) for frame in encoder.encode(each)]
            jobs.append(
                EncodeJob(
                    job_id=number, patch_hash=str(number), modality="image", num_tokens=num_tokens,
                    num_frames=len(own), slot=slot,
                )
            )  # fmt: skip
            frames += own
        said.clear()
        stage.handle(Encode(jobs=jobs), frames)
        end = time.monotonic() + 20
        while stage.has_work() and time.monotonic() < end:
            stage.step()
        told = {job.job_id: "encoded" for message in said if isinstance(message, Encoded) for job in message.jobs}
        told |= {message.job_id: message.message for message in said if isinstance(message, EncodeFailed)}
        return [told.get(job.job_id, "nothing") for job in jobs]

    good, small, large = item(1), item(2, **SMALL), item(3, **LARGE)
    shape = lambda each: list(each["pixel_values"].data.shape)  # noqa: E731
    told: dict[str, Any] = {"shapes": [shape(good), shape(small), shape(large)]}
    told["good"] = run(good, item(4), item(5))
    told["one is bad"] = run(good, large, item(6))
    told["a small one among others"] = run(good, small, item(10))
    told["all are bad"] = run(small, large)
    told["bad alone"] = run(small)
    told["another number of tokens"] = run(good, num_tokens=TOKENS + 1)
    told["too many tokens"] = run(good, num_tokens=100_000)
    told["no tokens"] = run(good, num_tokens=0)
    empty = MultiModalKwargsItem({name: each for name, each in good.items() if name != "pixel_values"})
    told["without pixels"] = run(good, empty, item(7))
    told["good again"] = run(good, item(8), item(9))
    told["held"] = [stage.held(), len(stage.engine.core.model_executor.driver_worker.worker.model_runner.requests)]
    stage.stop()
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()

"""Run by test_engines.py in a process of its own: one stage's real engine, and what it holds, as one JSON object."""

from __future__ import annotations

import json
import sys

from epd.builtin import model_path
from epd.config import Config
from epd.messages import Stage
from workers.engine import Engine

KV_BYTES = 64 << 20
DTYPE = "float32"  # in bfloat16, vLLM has the biases of linear layers in float32 on CPUs with AMX


def main() -> None:
    config = Config(
        model=str(model_path()),
        engine={"max_model_len": 512, "dtype": DTYPE, "kv_cache_memory_bytes": KV_BYTES},
    )
    engine = Engine(config, Stage(sys.argv[1]), "memory-test")
    info, cache = engine.info(), engine.vllm_config.cache_config
    told = {
        "tower": info.tower_bytes,
        "language": info.language_bytes,
        "kv_capacity_tokens": info.kv_capacity_tokens,
        "num_blocks": cache.num_gpu_blocks,
        "block_size": cache.block_size,
        "padded_vocabulary": -(-engine.vllm_config.model_config.get_vocab_size() // 64) * 64,
    }
    if sys.argv[1] != "encode":
        groups = engine.scheduler.kv_cache_config.kv_cache_groups
        told["page_bytes"] = sum(each.kv_cache_spec.page_size_bytes * len(each.layer_names) for each in groups)
    print(json.dumps(told), flush=True)
    engine.shutdown()


if __name__ == "__main__":
    main()

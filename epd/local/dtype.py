"""Which number type a pipeline computes in on CPUs without instructions for bfloat16: float32, unless told otherwise.

Lives in the supervisor's process (`epd up`, `epd demo`, tests); owns nothing. Such a CPU emulates bfloat16, which makes
a model several times slower than float32 does. The choice is made once for all daemons of a pipeline, which must agree;
daemons that are started one by one on hosts of their own get it from their configuration only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from epd.config import Config, ConfigError
from epd.local.environment import has_cuda
from epd.planning.configs import find_config, own_dtype

# As Linux calls them: x86 (Cooper Lake, Sapphire Rapids, Zen 4 and later), Arm (Neoverse V1 and later).
_INSTRUCTIONS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
_CPUINFO = Path("/proc/cpuinfo")
_STAGES = ("encode", "prefill", "decode")

NOTE = (
    "this CPU has no instructions for bfloat16: computing in float32, which takes twice the memory"
    " (--engine dtype=bfloat16 keeps the model's type)"
)


def lacks_bfloat16(cpuinfo: str) -> bool:
    """Whether a CPU emulates bfloat16, by the text of its `/proc/cpuinfo`; False where that does not say."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    flags = next((value for name, _, value in lines if name.strip() in ("flags", "Features")), "")
    return bool(flags) and _INSTRUCTIONS.isdisjoint(flags.split())


def needs_own_dtype(model: dict[str, Any]) -> bool:
    """Whether a model (its `config.json`) stays in its own type: it is in no bfloat16, or has kernels for that only."""
    sections = [model, *(one for one in model.values() if isinstance(one, dict))]
    quantized = any(section.get("quantization_config") for section in sections)
    recurrent = any("linear_attention" in (section.get("layer_types") or ()) for section in sections)
    return quantized or recurrent or own_dtype(model).removeprefix("torch.") != "bfloat16"


def for_this_host(config: Config) -> tuple[Config, str]:
    """Returns `config` with the type that suits this host where nobody has chosen one, and what to tell the user.

    What is told is empty if nothing was changed. A model whose configuration is not on this host yet is left alone.
    """
    chosen = any("dtype" in engine for engine in (config.engine, *(getattr(config, stage).engine for stage in _STAGES)))
    if chosen or has_cuda() or not _CPUINFO.exists() or not lacks_bfloat16(_CPUINFO.read_text()):
        return config, ""
    try:
        _, model = find_config(config.model)
    except ConfigError:
        return config, ""
    if needs_own_dtype(model):
        return config, ""
    return msgspec.structs.replace(config, engine=config.engine | {"dtype": "float32"}), NOTE

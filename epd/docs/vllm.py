"""The page `docs/vllm.md`: which module of ours touches which names of vLLM, read from the imports.

Lives in a developer's process; pure but for reading our own sources.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

from epd.docs.parts import note

_ROOT = Path(__file__).resolve().parent.parent.parent
_PACKAGES = ("epd", "broker", "cache", "workers")

_TEXT = """\
# Names of vLLM

EPD is written against vLLM 0.32. This page lists everything of vLLM that it imports, by module: what to check when vLLM
is upgraded. `tests/endpoint/test_vllm_contract.py` and `tests/workers/test_vllm_contract.py` check what is assumed of
names that are not public API.

vLLM is patched at run time only in these places:

| where | what |
|---|---|
| `epd/endpoint/engine/llm.py` | `async_llm.EngineCoreClient`, while `AsyncLLM` is made |
| `epd/endpoint/media/processor_cache.py` | methods and caches of the endpoint's renderer and multimodal processor |
| `epd/endpoint/media/repeats.py` | the renderer's way for pictures that were processed before |
| `epd/endpoint/media/connector.py` | what fetches media, in vLLM's registry of it |
| `workers/quiet_threads.py` | NIXL's configuration class, and torch's process groups |
| `workers/adapters.py` | what LoRA's layers do in steps without an adapter |
| `workers/engine.py` | the scheduler's cache of encoder outputs |
| `workers/parameters.py` | the model runner of an encode worker: no language model, no M-RoPE |
| `workers/isolation.py` | how the model runner of an encode worker runs the encoder |

## By module
"""


def names_of(source: str) -> list[str]:
    """The full names of vLLM that a source imports, wherever in it, sorted."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if _is_vllm(alias.name)}
        elif isinstance(node, ast.ImportFrom) and node.module and _is_vllm(node.module):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return sorted(found)


def vllm() -> str:
    """The page `docs/vllm.md`."""
    lines = [note("the imports of epd/, broker/, cache/ and workers/"), _TEXT]
    for package in _PACKAGES:
        for path in sorted((_ROOT / package).rglob("*.py")):
            names = names_of(path.read_text("utf-8"))
            if names:
                lines += [f"- `{path.relative_to(_ROOT).as_posix()}`", *_grouped(names)]
    return "\n".join(lines) + "\n"


def _grouped(names: list[str]) -> list[str]:
    modules: dict[str, list[str]] = defaultdict(list)
    for name in names:
        module, _, leaf = name.rpartition(".")
        modules[module].append(f"`{leaf}`")
    return [f"  - {module}: {', '.join(leaves)}" for module, leaves in modules.items()]


def _is_vllm(module: str) -> bool:
    return module == "vllm" or module.startswith("vllm.")

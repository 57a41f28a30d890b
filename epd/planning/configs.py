"""Finds a model's `config.json`: a file, a folder, a name in the local Hugging Face cache, or one that comes with EPD.

Lives in the user's process; reads files, never the network.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from epd import builtin
from epd.config import ConfigError

PAPER = Path(__file__).parent / "models"
"""Folder of the sizes of the paper's models: what decides about memory in their published configurations."""

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "half": 2, "fp8": 1, "int8": 1}


def find_config(name: str) -> tuple[str, dict[str, Any]]:
    """A model's name for people, and its configuration.

    Args:
        name: a `config.json`, a folder with one, a repository in the local cache, "builtin", or one of `PAPER`.

    Raises:
        ConfigError: there is none, or it cannot be read.
    """
    path = _path_of(name)
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: not a model's configuration")
    if path.parent == builtin.model_path():
        return builtin.MODEL_NAME, config
    return path.parent.name if path.name == "config.json" and Path(name).exists() else Path(name).name, config


def _path_of(name: str) -> Path:
    if name in ("", "builtin"):
        return builtin.model_path() / "config.json"
    path = Path(name).expanduser()
    if path.is_dir():
        return path / "config.json"
    if path.is_file():
        return path
    if (known := PAPER / f"{name.lower()}.json").is_file():
        return known
    import huggingface_hub

    try:
        found = huggingface_hub.try_to_load_from_cache(name, "config.json")
    except ValueError:  # not the name of a repository
        found = None
    if not isinstance(found, str):
        known_names = ", ".join(sorted(each.stem for each in PAPER.glob("*.json")))
        raise ConfigError(f"model {name}: no such file or folder, not in the local cache, and none of {known_names}")
    return Path(found)


def dtype_bytes(dtype: str) -> int:
    """Bytes of a number of this type.

    Raises:
        ConfigError: the type is not known.
    """
    try:
        return _DTYPE_BYTES[dtype.removeprefix("torch.")]
    except KeyError:
        raise ConfigError(f"dtype {dtype!r}: one of {', '.join(_DTYPE_BYTES)}") from None


def own_dtype(config: dict[str, Any]) -> str:
    """The type of the weights, according to a configuration; bfloat16 if it says nothing."""
    sections = [config, *(config.get(name) for name in ("text_config", "llm_config"))]
    named = (section.get(key) for section in sections if isinstance(section, dict) for key in ("dtype", "torch_dtype"))
    return next((str(dtype) for dtype in named if dtype), "bfloat16")

"""Checks what the distribution's extras install, and says which one is missing before anything is started.

Lives in the process of the command line; pure. Nothing is imported to find out.
"""

from __future__ import annotations

import importlib.util

from epd.config import ConfigError

ENGINE = ("torch", "vllm")
"""What a pipeline needs; the broker, the cache daemon and the client do not."""
MODELS = ("torch", "transformers")
"""What counting a model's parameters needs."""


def need(modules: tuple[str, ...]) -> None:
    """Returns if all these modules can be imported.

    Raises:
        ConfigError: some cannot; the text names the extra that brings them.
    """
    missing = [name for name in modules if not _is_there(name)]
    if missing:
        raise ConfigError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: "
            "pip install 'epd[cpu]', or 'epd[cuda]' for NVIDIA GPUs"
        )


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # imported in an unusual way
        return True

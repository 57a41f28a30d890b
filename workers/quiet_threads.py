"""Keeps threads of NIXL and gloo from waking for nothing. Lives in a worker; called before its engine is built.

Written against NIXL 1.5 and vLLM 0.32; changes their Python sides in this process only.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from vllm.distributed import nixl_utils

from epd.process import logs

NIXL_PROGRESS_US = 100_000


def calm_nixl() -> None:
    """Lets NIXL's progress thread sleep until something happens; call it before the engine is built.

    NIXL 1.5's Python API sets the thread's delay to 0, which makes it spin. With any other delay it waits for events of
    the transport, and wakes every `NIXL_PROGRESS_US` microseconds.
    """
    logs.adopt("nixl")
    bindings = sys.modules[nixl_utils.NixlWrapper.__module__].nixlBind
    config = bindings.nixlAgentConfig
    if config.__name__ == "EventDrivenConfig":
        return

    class EventDrivenConfig(config):  # type: ignore[valid-type, misc]
        """NIXL's agent configuration, which ignores a delay of 0."""

        @property
        def pthrDelay(self) -> int:
            """How many microseconds the progress thread sleeps at most."""
            return int(config.pthrDelay.__get__(self))

        @pthrDelay.setter
        def pthrDelay(self, delay_us: int) -> None:
            config.pthrDelay.__set__(self, delay_us or NIXL_PROGRESS_US)

    bindings.nixlAgentConfig = EventDrivenConfig


def share_process_group() -> None:
    """Gives an engine of a single process one process group instead of a dozen; call it before the engine is built.

    vLLM makes a group for each kind of parallelism, and on CPUs each has a gloo thread that wakes 100 times a second.
    With a single process they are all the same group.
    """
    distributed = torch.distributed
    make, destroy = distributed.new_group, distributed.destroy_process_group

    def new_group(*args: Any, **kwargs: Any) -> Any:
        return distributed.group.WORLD if distributed.get_world_size() == 1 else make(*args, **kwargs)

    def destroy_process_group(group: Any = None) -> None:
        if group is None or distributed.get_world_size() > 1:
            destroy(group)

    distributed.new_group, distributed.destroy_process_group = new_group, destroy_process_group

"""Keeps one item's failure from failing others: a batch that the encoder fails on is encoded again item by item.

Lives in the processes of vLLM's workers (0.32), called by `collective_rpc`; everything here is given vLLM's worker. An
item that raises by itself is reported as a failed job, and the engine goes on. A device that no longer works is not the
item's fault; it ends the worker.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from vllm.distributed.ec_transfer import get_ec_transfer

from cache.ec_connector import PatchCacheConnector

# For each request, which of its items are to be encoded.
Inputs = dict[str, list[int]]


def isolate_items(worker: Any) -> None:
    """Runs beside an encode worker's model: makes items fail one by one."""
    runner = worker.model_runner
    state = getattr(runner, "model_state", None)
    if state is not None:  # vLLM's V2 model runner
        encode_some = state.execute_mm_encoder

        def encode_all(inputs: Inputs) -> None:
            _one_by_one(encode_some, inputs, runner.device)

        state.execute_mm_encoder = encode_all
        return
    encode = runner._execute_mm_encoder

    def encode_scheduled(scheduled: Any) -> list[torch.Tensor]:
        def encode_some(inputs: Inputs) -> None:
            encode(dataclasses.replace(scheduled, scheduled_encoder_inputs=inputs))

        _one_by_one(encode_some, scheduled.scheduled_encoder_inputs, runner.device)
        return []  # the outputs are in the encoder cache; nobody here asks for more

    runner._execute_mm_encoder = encode_scheduled


def _one_by_one(encode: Callable[[Inputs], None], inputs: Inputs, device: torch.device) -> None:
    """Encodes all together, or each alone if that raises; each request has one item, and has its name."""
    if not inputs:
        return
    try:
        encode(inputs)
        return
    except Exception as error:
        _check_device(device, error)
        if len(inputs) == 1:
            _report(next(iter(inputs)), error)
            return
    for name, items in inputs.items():
        try:
            encode({name: items})
        except Exception as error:
            _check_device(device, error)
            _report(name, error)


def _check_device(device: torch.device, error: Exception) -> None:
    """Raises `error` if the device no longer computes, as after an assertion in a kernel."""
    try:
        torch.zeros(1, device=device).add_(1).item()
    except Exception:
        raise error from None


def _report(job: str, error: Exception) -> None:
    connector = get_ec_transfer()
    assert isinstance(connector, PatchCacheConnector)
    connector.not_encoded(job, f"the encoder failed on it: {type(error).__name__}: {error}"[:500])

"""Counts the parameters of a stage's model, and drops those that other stages need.

Lives in the processes of vLLM's workers (0.32), called by `collective_rpc`; everything here is given vLLM's worker.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import StageMissingLayer


def _parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module, str, torch.nn.Parameter]]:
    """Each parameter that takes memory: "tower", "language" or "both", then its module, its name and the parameter."""
    towers = tuple(f"{name}." for name in model._tower_model_names)
    languages = tuple(f"{name}." for name in model._language_model_names)
    for path, module in model.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.device.type == "meta":
                continue
            if f"{path}.{name}".startswith(towers):
                part = "tower"
            elif f"{path}.{name}".startswith(languages) or isinstance(module, VocabParallelEmbedding):
                part = "language"
            else:
                part = "both"
            yield part, module, name, parameter


def parameter_bytes(worker: Any) -> tuple[int, int]:
    """Runs beside the model: bytes of tower and of language parameters; the few that are neither count for the stage.

    On CPUs vLLM packs linear weights into another format and leaves an empty parameter: these count with their layer's
    size.
    """
    counts = {"tower": 0, "language": 0, "both": 0}
    for part, module, name, parameter in _parameters(worker.get_model()):
        nbytes = parameter.nbytes
        if not nbytes and name == "weight" and isinstance(module, LinearBase):
            rows = getattr(module, "output_size_per_partition", module.output_size)
            columns = getattr(module, "input_size_per_partition", module.input_size)
            nbytes = rows * columns * parameter.element_size()
        counts[part] += nbytes
    encodes = worker.vllm_config.is_mm_encoder_only
    return counts["tower"] + encodes * counts["both"], counts["language"] + (not encodes) * counts["both"]


def drop_language_model(worker: Any) -> None:
    """Runs beside an encode worker's model: frees what vLLM's encoder-only mode leaves of the language model.

    That is the output head in vLLM 0.32; nothing runs it here.
    """
    for part, module, name, parameter in _parameters(worker.get_model()):
        if part == "language":
            module.register_parameter(name, torch.nn.Parameter(parameter.new_empty(0), requires_grad=False))


def drop_tower(worker: Any) -> None:
    """Runs beside a prefill or decode worker's model: frees the tower that it was made with; nothing runs it here.

    It is replaced by what vLLM puts in its place when it makes a model without a tower.
    """
    model = worker.get_model()
    for path in model._tower_model_names:
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        tower = getattr(owner, name)
        if isinstance(tower, StageMissingLayer):
            continue
        for module in tower.modules():
            vars(module).pop("cpu_linear", None)  # holds the weights, packed
        setattr(owner, name, StageMissingLayer("tower", tower.to("meta")))


def skip_positions(worker: Any) -> None:
    """Runs beside an encode worker's model: without a language model, nothing has a position in a prompt.

    M-RoPE models would look for an item's surroundings in the prompt, but a patch has none.
    """
    runner = worker.model_runner
    runner.uses_mrope = False
    if getattr(runner, "model_state", None) is not None:  # vLLM's V2 model runner
        runner.model_state.rope_state = None

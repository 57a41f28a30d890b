"""What the items of a modality are cut into, as the encode workers have proved it. Pure; imports no engine."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from epd.messages import Stage, WorkerStatus

ITEM = "item"


class Unit(msgspec.Struct, frozen=True):
    """A kind of piece that may be encoded alone; a full one gives `num_tokens` embeddings."""

    name: str
    num_tokens: int


def agreed_units(workers: Iterable[WorkerStatus]) -> dict[str, Unit] | None:
    """Modality -> the unit that every encode worker among `workers` reports; None if there is no such worker.

    Modalities on which they differ are left out, and so are those whose unit is the whole item.
    """
    reports = [worker.info for worker in workers if worker.stage is Stage.ENCODE]
    if not reports:
        return None
    units: dict[str, Unit] = {}
    for modality, name in reports[0].units.items():
        mine = Unit(name, reports[0].tokens_per_patch.get(modality, 0))
        same = all(
            info.units.get(modality) == mine.name and info.tokens_per_patch.get(modality, 0) == mine.num_tokens
            for info in reports
        )
        if same and name != ITEM:
            units[modality] = mine
    return units


def described(workers: Iterable[WorkerStatus]) -> dict[str, dict[str, str] | dict[str, int]]:
    """For people: modality -> unit, "item" if items stay whole, and the embeddings of a full patch."""
    workers = list(workers)
    spread = agreed_units(workers) or {}
    modalities = {modality for worker in workers for modality in worker.info.units}
    return {
        "units": {modality: spread[modality].name if modality in spread else ITEM for modality in sorted(modalities)},
        "tokens_per_patch": {modality: unit.num_tokens for modality, unit in sorted(spread.items())},
    }

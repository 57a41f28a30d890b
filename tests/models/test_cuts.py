"""How items of the real processors are cut: what the encoder would get, and where in the prompt it goes. No engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.models.registry import FAMILIES, ITEM
from tests.models.report import COLUMNS, PAGE

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]

# Embeddings of 30 seconds.
_FULL_CHUNKS = {"audioflamingo3": 750, "glmasr": 375}
CASES = [(name, modality) for name, family in FAMILIES.items() for modality in family.units]


@pytest.fixture(scope="module")
def dummies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A family's configuration and dummy items, made once.

    To find out what a model's class can do, vLLM imports it in a process of its own, which takes seconds for each class
    that it has not seen on this machine. Here it does so in this one, for the tests after this module, too.
    """
    from vllm.model_executor.models import registry

    made: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in made:
            from vllm.engine.arg_utils import EngineArgs

            from epd.multimodal.dummies import Dummies

            family = FAMILIES[name]
            folder: Path = family.folder(tmp_path_factory.mktemp("models"), name)
            args = EngineArgs(
                model=str(folder), max_model_len=2048, enforce_eager=True, limit_mm_per_prompt=family.limits,
                **family.engine,
            )  # fmt: skip
            config = args.create_engine_config()
            made[name] = config, Dummies(config)
        return made[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_run_in_subprocess", lambda call: call())
        yield get


@pytest.mark.parametrize(("name", "modality"), CASES)
def test_pieces_make_up_the_item_and_its_place(dummies: Any, name: str, modality: str) -> None:
    from epd.multimodal.rules import way_for

    config, found = dummies(name)
    way, numbers = way_for(config, modality), []
    for dummy in found.of(modality):
        pieces = way.pieces(dummy.item)
        numbers.append(len(pieces or ()))
        if not pieces:
            continue
        cut = way.cut(dummy.item, dummy.position, _FULL_CHUNKS.get(name, 0))
        assert cut is not None and len(cut) == len(pieces)
        places = [dummy.position.offset + i for i in _embeds(dummy.position)]
        assert [piece.position.offset + i for piece in cut for i in _embeds(piece.position)] == places
        assert all(set(piece.item) == set(dummy.item) for piece in cut)
        _assert_same_content(dummy.item, [piece.item for piece in cut])
    assert (max(numbers) > 1) == (FAMILIES[name].units[modality] != ITEM), numbers


def _embeds(position: Any) -> list[int]:
    mask = position.is_embed
    return list(range(position.length)) if mask is None else mask.nonzero().flatten().tolist()


def _assert_same_content(whole: Any, pieces: list[Any]) -> None:
    """Each pixel and each sample is in exactly one piece, padding apart."""
    import torch

    for field, elem in whole.items():
        if not isinstance(elem.data, torch.Tensor) or not elem.data.is_floating_point() or elem.data.dim() < 2:
            continue
        assert sum(float(one[field].data.double().sum()) for one in pieces) == pytest.approx(
            float(elem.data.double().sum()), rel=1e-9, abs=1e-6
        )
        assert sum(int((one[field].data != 0).sum()) for one in pieces) == int((elem.data != 0).sum())


def test_the_models_page_has_a_line_for_each_family_and_modality() -> None:
    lines = [line[2:-2] for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    rows = [line.split(" | ") for line in lines]
    told = {(row[0], row[2]): row[3] for row in rows if len(row) == len(COLUMNS) and row[0] != COLUMNS[0]}
    expected = {
        (family.title, modality): unit for family in FAMILIES.values() for modality, unit in family.units.items()
    }
    assert told == expected, "write it again: python -m tests.models report"

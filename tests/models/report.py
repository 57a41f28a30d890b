"""Writes docs/models.md: `python -m tests.models report`. Every figure in it is measured on the spot.

Makes the tiny model of each family and examines it in a child of its own, forked after vLLM has been imported.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from epd.config import Config
from epd.local import environment
from tests.models.registry import FAMILIES, ITEM, Family

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "models.md"

_HEAD = """\
<!-- Written by `python -m tests.models report` from what it measures. Do not edit this page. -->

# Models

EPD serves what vLLM serves, as far as prefill and decode can do without the encoder. What differs from family to family
is the **unit of fan-out**: what a picture, a video or a sound can be cut into so that each piece is encoded alone, on
whichever encode worker is free, cached under its own name, and prefilled as soon as it is there.

The unit is not taken from a list. When it starts, an encode worker makes a dummy item of noise with the model's own
processor, encodes it whole and in pieces with the model's own encoder, and compares
([ADR 12](adr/0012-splitting-by-proof.md)). Only where all encode workers have found the same unit are items cut;
everything else stays whole, which is always right. `GET /v1/models` shows the units of a running pipeline
(`epd.units` in each card), `GET /ready` those of each worker, and

    epd models check NAME_OR_DIR

proves them for any model.

## Families that were tried

Each line is a tiny model with random weights and the family's real code and processor, on a CPU in bfloat16.

- **pieces against whole** is what the proof measured here: the largest distance of an embedding from the whole item's,
  relative to its length.
- **equal to plain vLLM** says whether `tests/models/test_families.py` compares tokens and log-probabilities with plain
  vLLM's through HTTP, with two encode workers, and counts the patches that were encoded.
- **tokens per patch** are those of a full piece of the tiny model, or of the whole dummy item. Real models have more.

"""
_TAIL = """
"Not cut" means that the fields of an item name no pieces, so that there is nothing to compare.

## Not tried here
These need code or files from their repositories, which the tests do not load. They are handled like any other model:
what an encode worker proves is cut, the rest stays whole.

| family | architecture in vLLM | why not | what an encode worker would try |
|---|---|---|---|
| InternVL 2, 2.5 (original format) | InternVLChatModel | configuration in remote code | tiles, frames |
| MiniCPM-V 2.x, MiniCPM-o | MiniCPMV, MiniCPMO | processor in remote code | slices, frames |
| Ultravox | UltravoxModel | processor in remote code | chunks |
| Voxtral, Pixtral (Mistral's format) | VoxtralForConditionalGeneration, PixtralForConditionalGeneration | a Mistral \
tokenizer | nothing |
"""
COLUMNS = (
    "family",
    "architecture in vLLM",
    "modality",
    "unit of fan-out",
    "pieces against whole",
    "equal to plain vLLM",
    "tokens per patch",
    "notes",
)


def write() -> None:
    """Examines all families and writes the page."""
    import workers.proving  # noqa: F401  # vLLM is imported once, before the children are forked

    rows = []
    with tempfile.TemporaryDirectory() as base:
        for name, family in FAMILIES.items():
            rows += lines(name, family, examined(family, Path(base), name))
            print(*rows[-len(family.units) :], sep="\n", flush=True)
    head = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    PAGE.write_text(_HEAD + "\n".join([*head, *rows]) + "\n" + _TAIL)


def examined(family: Family, base: Path, name: str) -> dict[str, Any]:
    """What `epd models check` finds."""
    config = environment.resolve_model(
        Config(
            model=str(family.folder(base, name)),
            engine={"max_model_len": 2048, "dtype": "bfloat16", "limit_mm_per_prompt": family.limits} | family.engine,
        )
    )
    ours, theirs = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_examine, args=(config, theirs))
    child.start()
    theirs.close()
    try:
        found: dict[str, Any] = json.loads(ours.recv_bytes())
        return found
    finally:
        child.join()


def _examine(config: Config, pipe: Connection) -> None:
    from epd.local.examine import examine

    pipe.send_bytes(json.dumps(examine(config).as_json()).encode())


def lines(name: str, family: Family, told: dict[str, Any]) -> list[str]:
    """The family's rows of the table."""
    from tests.models.test_families import QUESTIONS

    proved = {one["modality"]: one for one in told.get("modalities", [])}
    asked = {modality for question in QUESTIONS.get(name, ()) for modality in question.modalities}
    rows = []
    for modality, unit in family.units.items():
        one = proved.get(modality)
        notes = [family.notes.get(modality, ""), family.not_served]
        if one is not None:
            unit = one["unit"]
            notes.append(told["refused"] if not family.not_served else "")
        cells = [
            family.title,
            family.architecture,
            modality,
            unit,
            _difference(one),
            "yes" if name in QUESTIONS and modality in asked else family.tested_by.get(modality, "not tried"),
            str(one["tokens_per_patch"]) if one else "",
            "; ".join(note for note in notes if note),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _difference(one: dict[str, Any] | None) -> str:
    if one is None:
        return "not run"
    if one["difference"] is None:
        return "not cut" if one["unit"] == ITEM else "not measured"
    return "bit-equal" if one["difference"] == 0 else f"{one['difference']:.1e}"

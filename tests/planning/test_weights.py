"""Counted parameters are those of real files, and of the models that the paper names."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from epd.builtin import model_path
from epd.planning.configs import find_config
from epd.planning.paper import CLAIMS, Claims

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]  # torch and transformers


def sizes_of(folder: Path) -> dict[str, int]:
    """Numbers of parameters in a model's safetensors file, by name."""
    data = (folder / "model.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return {name: math.prod(one["shape"]) for name, one in header.items() if name != "__metadata__"}


def parts_of(sizes: dict[str, int]) -> dict[str, int]:
    counts = dict.fromkeys(("tower", "projector", "language", "other"), 0)
    for name, count in sizes.items():
        if "connector" in name or "projector" in name:
            part = "projector"
        elif "vision" in name:
            part = "tower"
        else:
            part = "other" if "image_newline" in name else "language"
        counts[part] += count
    return counts


def counted(folder: Path) -> dict[str, int]:
    from epd.planning.weights import count_parameters

    found = count_parameters(json.loads((folder / "config.json").read_text()))
    return {name: getattr(found, name) for name in found.__struct_fields__}


def test_the_built_in_models_parts_are_those_of_its_file() -> None:
    assert counted(model_path()) == parts_of(sizes_of(model_path()))


@pytest.mark.parametrize("family", ["llava_onevision", "mistral3"])
def test_the_parts_of_other_families_are_those_of_their_files(family: str, tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "tests.models.tiny", family, str(tmp_path)], check=True, capture_output=True)
    assert counted(tmp_path) == parts_of(sizes_of(tmp_path))


@pytest.mark.parametrize("claims", CLAIMS, ids=lambda claims: claims.config)
def test_the_papers_models_have_the_sizes_and_savings_that_it_states(claims: Claims) -> None:
    from epd.planning.weights import count_parameters

    found = count_parameters(find_config(claims.config)[1])
    tower, language = claims.billions
    assert found.tower / 1e9 == pytest.approx(tower, rel=0.08)
    assert found.language / 1e9 == pytest.approx(language, rel=0.09)
    share = 100 * found.tower / found.total
    assert share - 100 == pytest.approx(claims.encode_weights, abs=0.2)
    assert -share == pytest.approx(claims.prefill_weights, abs=0.2)


def test_the_page_is_up_to_date() -> None:
    from epd.planning import page

    assert page.main(["--check"]) == 0, "run `python -m epd.planning.page`"


def test_a_model_that_nobody_knows_is_refused() -> None:
    from epd.config import ConfigError
    from epd.planning.weights import count_parameters

    with pytest.raises(ConfigError, match="something_new"):
        count_parameters({"model_type": "something_new"})
    with pytest.raises(ConfigError, match="multimodal"):
        count_parameters({"model_type": "llama"})
    with pytest.raises(ConfigError, match="cannot build"):
        count_parameters({"model_type": "idefics3", "text_config": {"model_type": "llama", "pad_token_id": 10**6}})

"""`epd models check`: what it prints for people and for programs."""

import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

from epd.cli.models import difference, table
from epd.local.examine import Examination, Modality

TILES = Modality(
    modality="image", unit="tile", num_pieces=3, difference=0.0, tolerance=0.03, tokens_per_patch=64, dummy="96x32",
    seconds=0.05,
)  # fmt: skip
WHOLE = Modality(
    modality="video", unit="item", num_pieces=2, difference=0.4, tolerance=0.03, tokens_per_patch=9, dummy="6 frames",
    seconds=0.1, reason="frames encoded alone give other embeddings",
)  # fmt: skip


def test_the_table_has_a_row_for_each_modality():
    out = io.StringIO()
    Console(file=out, width=200).print(table(Examination(model="m", architecture="A", modalities=[TILES, WHOLE])))
    lines = [line.split("│") for line in out.getvalue().splitlines() if "│" in line]
    image, video = ([cell.strip() for cell in line[1:-1]] for line in lines)
    assert image == ["image", "tile", "3", "none (bit-equal)", "64", "0.05", ""]
    assert video == ["video", "item", "2", "4.0e-01", "9", "0.10", "frames encoded alone give other embeddings"]


def test_a_difference_that_was_not_measured_is_not_called_equal():
    assert [difference(value) for value in (None, 0.0, 0.0123)] == ["not measured", "none (bit-equal)", "1.2e-02"]


def check(*arguments):
    command = [sys.executable, "-m", "epd.cli", "models", "check", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.engine
@pytest.mark.timeout(120)
def test_the_built_in_model_is_cut_into_tiles():
    done = check("builtin", "--json")
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert (told["architecture"], told["refused"]) == ("Idefics3ForConditionalGeneration", "")
    [image] = told["modalities"]
    assert (image["modality"], image["unit"], image["tokens_per_patch"]) == ("image", "tile", 4)
    assert image["difference"] <= image["tolerance"] and image["num_pieces"] > 2


@pytest.mark.engine
@pytest.mark.timeout(120)
def test_a_refused_model_comes_with_the_reason():
    done = check("builtin", "--engine", "max_model_len=99999999")
    assert done.returncode == 1
    assert done.stdout.startswith("refused: ") and "max_model_len" in done.stdout

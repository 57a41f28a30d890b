"""The built-in model and picture are complete, unharmed and what their card says. Pure: no vLLM."""

import json
import math
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from epd import builtin

NUM_PARAMETERS = 1_688_576
MODEL_FILES = (
    "MODEL_CARD.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


def read_safetensors_header(path: Path) -> tuple[dict[str, dict], int]:
    """Return the tensors' entries and how many bytes of data follow the header."""
    content = path.read_bytes()
    (header_bytes,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + header_bytes])
    header.pop("__metadata__", None)
    return header, len(content) - 8 - header_bytes


@pytest.fixture(scope="module")
def card() -> str:
    """The text of the model card."""
    return (builtin.model_path() / "MODEL_CARD.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", MODEL_FILES)
def test_model_folder_has_every_file(name: str) -> None:
    path = builtin.model_path() / name
    assert path.is_file()
    assert path.stat().st_size > 0


def test_model_folder_has_no_other_file() -> None:
    assert sorted(path.name for path in builtin.model_path().iterdir()) == sorted(MODEL_FILES)


def test_weights_hold_as_many_parameters_as_the_card_says(card: str) -> None:
    header, _ = read_safetensors_header(builtin.model_path() / "model.safetensors")
    assert sum(math.prod(entry["shape"]) for entry in header.values()) == NUM_PARAMETERS
    assert f"{NUM_PARAMETERS:,}" in card


def test_weights_are_bfloat16_and_fill_the_file_without_gaps() -> None:
    header, num_data_bytes = read_safetensors_header(builtin.model_path() / "model.safetensors")
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    end = 0
    for start, stop in sorted(tuple(entry["data_offsets"]) for entry in header.values()):
        assert start == end
        end = stop
    assert end == num_data_bytes == 2 * NUM_PARAMETERS


def test_config_names_an_architecture_vllm_knows() -> None:
    config = json.loads((builtin.model_path() / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["Idefics3ForConditionalGeneration"]


def test_demo_picture_has_one_64_pixel_cell_for_each_digit_of_the_answer() -> None:
    rows = [line.split(" ") for line in builtin.DEMO_ANSWER.split("\n")]
    content = builtin.demo_image_path().read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    width_px, height_px = struct.unpack(">II", content[16:24])
    assert (height_px, width_px) == (64 * len(rows), 64 * len(rows[0]))


def test_demo_answer_is_a_grid_of_digits() -> None:
    assert re.fullmatch(r"([0-9.]( [0-9.])*\n)*[0-9.]( [0-9.])*", builtin.DEMO_ANSWER)
    assert len({line.count(" ") for line in builtin.DEMO_ANSWER.split("\n")}) == 1
    assert builtin.DEMO_QUESTION == "Read the grid."


def test_card_names_the_data_its_licence_and_the_model(card: str) -> None:
    for fact in ("load_digits", "Optical Recognition of Handwritten Digits", "CC BY 4.0", builtin.MODEL_NAME):
        assert fact in card


def test_importing_the_builtins_loads_neither_torch_nor_vllm() -> None:
    code = "import sys, epd.builtin; print(*sorted({'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == ""


def test_every_public_name_exists() -> None:
    for name in builtin.__all__:
        assert getattr(builtin, name)

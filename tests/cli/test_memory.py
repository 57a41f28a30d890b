"""`epd memory` on a command line."""

from __future__ import annotations

import json

import pytest

from epd.cli import main

pytestmark = pytest.mark.engine  # torch and transformers


def test_json_has_every_stage_of_every_way_of_serving_in_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "--json", "--gpu-gb", "1", "--image", "256x128", "--images", "2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["model"] == "epd/digit-reader"
    assert [(row["layout"], row["stages"]) for row in told["rows"]] == [
        ("one piece", ["encode", "prefill", "decode"]),
        ("EP+D", ["encode", "prefill"]),
        ("EP+D", ["decode"]),
        ("EPD", ["encode"]),
        ("EPD", ["prefill"]),
        ("EPD", ["decode"]),
    ]
    by_stage = {row["stages"][0]: row for row in told["rows"] if row["layout"] == "EPD"}
    assert (by_stage["encode"]["tower"], by_stage["encode"]["language"]) == (2 * 696_192, 0)
    assert (by_stage["decode"]["tower"], by_stage["decode"]["language"]) == (0, 2 * 992_384)
    assert told["kv_bytes_per_token"] == 2048
    assert by_stage["encode"]["free"] == int(0.9 * (1 << 30)) - 2 * 696_192


def test_the_table_shows_weights_kv_and_limits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "--model", "minicpm-v-2.6", "--kv-fraction", "0.8", "--attention", "eager"]) == 0
    shown = capsys.readouterr().out
    assert "8.1B parameters" in shown
    assert "10 patches of 64 tokens" in shown
    assert "EP+D 7 (memory), EPD 49 (context)" in shown
    [encode] = [line for line in shown.splitlines() if line.split()[:1] == ["encode"] and "+" not in line]
    assert encode.split() == ["encode", "0.91", "–", "0.91", "13.9", "–", "–", "–", "512", "5", "49", "context"]


def test_markdown_has_one_line_for_each_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["memory", "--markdown", "--model", "internvl2-8b", "--tensor-parallel", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 6
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model", "/no/such/folder"], "no such file"),
        (["--dtype", "int3"], "int3"),
        (["--kv-fraction", "1"], "between 0 and 1"),
        (["--gpu-gb", "0"], "at least 1"),
    ],
)
def test_wrong_options_are_refused_with_the_reason(
    options: list, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["memory", *options]) == 2
    assert words in capsys.readouterr().err


def test_text_that_is_not_a_size_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["memory", "--image", "big"])
    assert "4032x3024" in capsys.readouterr().err

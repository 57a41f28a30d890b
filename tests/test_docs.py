"""The documentation says what the code says: generated pages, links, commands, configurations, names of files."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest

from broker.core.request import TRANSITIONS, State
from epd import config, docs
from epd.cli import COMMANDS, build_parser
from epd.docs.vllm import names_of

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted(
    [*(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("README.md"), ROOT / "README.md", ROOT / "CHANGELOG.md"]
)
UNITS = sorted((ROOT / "examples" / "systemd").glob("*.service"))


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)


def without_code(path: Path) -> str:
    return re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", without_code(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands() -> list[str]:
    found = []
    for path in PAGES:
        for block in blocks(path, "sh"):
            found += [line for line in block.replace("\\\n", " ").splitlines() if line.startswith("epd ")]
    for path in UNITS:
        found += re.findall(r"^ExecStart=\S*/(epd .*)$", path.read_text("utf-8"), re.MULTILINE)
    return found


def test_the_generated_pages_are_up_to_date():
    assert docs.main(["--check"]) == 0, "run `make docs`"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(path: Path):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(path)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_file_that_a_page_names_in_full_is_there(path: Path):
    folders = "epd|broker|cache|workers|tests|examples|docs|scripts|benchmarks"
    for name in re.findall(rf"`((?:{folders})/[\w./-]*)`", without_code(path)):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("line", commands())
def test_every_epd_command_line_is_one(line: str):
    words = shlex.split(line, comments=True)[1:]
    command = next(word for word in words if not word.startswith("-"))
    assert command in COMMANDS
    build_parser(command).parse_args(words)  # ends the process where it does not know an option


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path, "toml")], ids=name_of)
def test_every_configuration_on_a_page_can_be_read(path: Path, tmp_path: Path):
    for number, block in enumerate(blocks(path, "toml")):
        file = tmp_path / f"{number}.toml"
        file.write_text(block)
        assert config.load(file).model


def test_the_configuration_for_systemd_can_be_read_and_has_the_defaults_that_it_shows():
    path = ROOT / "examples" / "systemd" / "epd.toml"
    loaded, shown, default = config.load(path), tomllib.loads(path.read_text()), config.Config()
    own = {"broker.address", "cache.pool_bytes", "log.format"}
    for section in ("broker", "cache", "endpoint", "log"):
        for key in shown[section].keys() - {name.partition(".")[2] for name in own if name.startswith(section)}:
            assert getattr(getattr(loaded, section), key) == getattr(getattr(default, section), key), key


def test_every_python_block_compiles():
    for path in PAGES:
        for block in blocks(path, "python"):
            compile(block, name_of(path), "exec")


def test_the_picture_of_a_request_s_states_is_the_table():
    [diagram] = [each for each in blocks(ROOT / "docs" / "architecture.md", "mermaid") if "stateDiagram" in each]
    shown = set(re.findall(r"(\w+) --> (\w+): (\w+)", diagram))
    assert shown == {(str(state), str(after), str(event)) for (state, event), after in TRANSITIONS.items()}
    left = {state for state, _ in TRANSITIONS}
    assert set(re.findall(r"(\w+) --> \[\*\]", diagram)) == {str(state) for state in State if state not in left}


def test_pictures_are_well_formed():
    for path in (ROOT / "docs" / "pictures").glob("*.svg"):
        ElementTree.parse(path)


def test_architecture_names_every_folder_with_python_files_and_no_other():
    text = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    table = text.partition("| folder | what lives there |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]
    named = [folder.strip("`/") for folder, _ in rows]
    folders = {path.parent.relative_to(ROOT).as_posix() for path in modules()}
    assert len(named) == len(set(named)), "one row for one folder"
    assert set(named) == folders, set(named) ^ folders
    assert all(what for _, what in rows)


def modules() -> list[Path]:
    return sorted(path for package in ("epd", "broker", "cache", "workers") for path in (ROOT / package).rglob("*.py"))


# What a module that says no more than "Pure" has no business with.
IMPURE = {"aiohttp", "asyncio", "concurrent", "multiprocessing", "signal", "socket", "subprocess", "threading", "zmq"}


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_every_module_says_first_what_it_is_and_then_in_which_process_unless_it_is_pure(path: Path):
    assert (wrong := what_is_missing(path.read_text("utf-8"))) == "", wrong


def what_is_missing(source: str) -> str:
    tree = ast.parse(source)
    opening = " ".join((ast.get_docstring(tree) or "").partition("\n\n")[0].split())
    text = " ".join((ast.get_docstring(tree) or "").split())
    if not re.match(r"(?!Lives in|Pure|Part of|See )\S.{15,}?[.:](\s|$)", opening):
        return "the first sentence does not say what it is"
    if re.search(r"\b[Ll]ives in\b", text):
        return ""
    if not re.search(r"\b[Pp]ure\b", text):
        return "neither pure nor is there a process that it lives in"
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    found = IMPURE & {name.partition(".")[0] for name in names}
    return f"it says that it is pure, and imports {found}" if found else ""


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("", "the first sentence"),
        ("'Lives in every process; owns nothing.'", "the first sentence"),
        ("'Counts what goes by, in order.'", "neither pure"),
        ("'Counts what goes by, in order. Pure.'\nimport socket", "imports {'socket'}"),
        ("'Counts what goes by, in order. Pure.'\ndef f():\n    from asyncio import sleep", "imports {'asyncio'}"),
        ("'Counts what goes by, in order.\\n\\nLives in every process.'\nimport socket", ""),
        ("'Counts what goes by, in order. Pure.'\nimport json", ""),
    ],
)
def test_a_module_that_does_not_say_what_and_where_it_is_is_found(source: str, wrong: str):
    found = what_is_missing(source)
    assert wrong in found
    assert bool(wrong) == bool(found)


def test_every_word_of_the_glossary_is_used_where_it_says():
    text = (ROOT / "docs" / "glossary.md").read_text("utf-8")
    rows = [row.strip("| ").split(" | ") for row in text.splitlines() if row.startswith("| ")]
    words = [word for word, *_ in rows if word != "word"]
    assert len(words) == len(set(words)) > 20, "one row for one word"
    for word, *_, where in rows:
        if word == "word":
            continue
        stem = word.removesuffix("y")  # story, stories
        source = (ROOT / where.strip("`")).read_text("utf-8")
        assert re.search(rf"\b{stem}", source, re.IGNORECASE), f"{word} in {where}"


def test_the_list_of_vllm_names_is_read_from_imports_of_every_kind():
    source = "import vllm.a\nfrom vllm.b import C, D as E\ndef f():\n    from vllm import G\nfrom vllmish import X\n"
    assert names_of(source) == ["vllm.G", "vllm.a", "vllm.b.C", "vllm.b.D"]


def test_the_walk_through_the_core_has_eight_steps_that_each_name_one_module():
    text = (ROOT / "docs" / "request_journey.md").read_text("utf-8")
    section = text.partition("## Through the broker's core\n")[2].partition("\n## ")[0]
    steps = re.findall(r"^\d\. (.*?)(?=^\d\. |\Z)", section, re.MULTILINE | re.DOTALL)
    modules = [re.findall(r"`(broker/[\w/]+\.py)`", step) for step in steps]
    assert len(steps) == 8
    assert all(len(names) == 1 and (ROOT / names[0]).is_file() for names in modules), modules
    assert len({names[0] for names in modules}) == 8

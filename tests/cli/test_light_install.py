"""What the command line does where only the light dependencies are installed: without vLLM, torch and transformers."""

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
REQUIREMENT = re.compile(r"^([A-Za-z0-9_.-]+)\s*(?:\[[^\]]*\])?[^;]*(;.*)?$")


def distributions():
    """EPD, the light dependencies and all that they need."""
    found, waiting = {}, ["epd", *tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]]
    while waiting:
        name, marker = REQUIREMENT.match(waiting.pop()).groups()
        if (marker and "extra" in marker) or name.lower() in found:
            continue
        try:
            found[name.lower()] = distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:  # of another Python or system
            continue
        waiting += distribution.requires or []
    return found.values()


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """A folder that has what a light installation has."""
    folder = tmp_path_factory.mktemp("light")
    for distribution in distributions():
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            source, target = Path(distribution.locate_file(top)), folder / top
            if source.exists() and not target.exists():
                target.symlink_to(source)
    return folder


def epd(light, *argv, timeout_s=30):
    code = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(light)!r}]; from epd.cli import main; sys.exit(main())"
    command = [sys.executable, "-I", "-S", "-c", code, *argv]
    return subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=timeout_s, check=False)


def test_the_folder_is_light(light):
    there = {path.name for path in light.iterdir()}
    assert {"aiohttp", "msgspec", "rich", "zmq", "uvloop"} <= there
    assert not there & {"vllm", "torch", "transformers", "numpy", "fastapi"}


@pytest.mark.parametrize(
    "argv",
    [
        ["up"],
        ["up", "--model", "org/name", "--encode", "2"],
        ["demo"],
        ["models", "check", "builtin"],
        ["worker", "--stage", "encode"],
        ["endpoint", "--port", "0"],
        ["memory"],
        ["memory", "--model", "internvl2-8b"],
        ["memory", "--model", "org/name"],
    ],
    ids=" ".join,
)
def test_what_needs_an_extra_names_it_in_one_line(light, argv):
    ended = epd(light, *argv)
    assert (ended.returncode, ended.stdout) == (2, "")
    [line] = ended.stderr.splitlines()
    assert re.match(rf"epd {argv[0]}: torch and \w+ are not installed: pip install 'epd\[cpu\]'", line)


@pytest.mark.parametrize("argv", [["--version"], ["--help"], ["up", "--help"], ["memory", "--help"]], ids=" ".join)
def test_what_needs_none_works(light, argv):
    ended = epd(light, *argv)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_the_extras_that_are_named_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {"cpu", "cuda"} <= set(extras)
    assert all(any(line.startswith("vllm") for line in extras[name]) for name in ("cpu", "cuda"))


def test_questions_to_a_pipeline_elsewhere_need_no_extra(light):
    for argv in (["ask", "Hello", "--url", "http://127.0.0.1:9"], ["cache", "ls", "--url", "http://127.0.0.1:9"]):
        ended = epd(light, *argv)
        assert ended.returncode == 1
        assert "Traceback" not in ended.stderr
        assert "127.0.0.1:9" in ended.stderr


def test_the_light_daemons_refuse_a_wrong_configuration_in_one_line_too(light):
    for daemon in ("broker", "cache"):
        ended = epd(light, daemon, "--set", "broker.adress=tcp://x")
        assert ended.returncode == 2
        assert ended.stderr.startswith(f"epd {daemon}: Object contains unknown field `adress`")


def test_replaying_needs_no_extra(light, tmp_path):
    ended = epd(light, "replay", str(tmp_path / "none.mpk"))
    assert "Traceback" not in ended.stderr
    assert ended.returncode != 0

"""The command line: what it understands, what it refuses and how, and that help costs nothing."""

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

import epd
import epd.client
from epd.cli import COMMANDS, build_parser, main, options
from epd.config import Config, ConfigError, dump

ROOT = Path(__file__).resolve().parent.parent.parent


def parse(*argv):
    return build_parser(argv[0]).parse_args(list(argv))


def configure(*argv):
    return options.configure(parse(*argv))


def run_python(code):
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def loaded_after(code, names=("torch", "vllm", "aiohttp", "rich", "zmq", "asyncio")):
    return run_python(f"{code}\nimport sys; print(*[name for name in {names!r} if name in sys.modules])").split()


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(f"\n    {name} " in text for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_of_its_own(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"usage: epd {command}" in capsys.readouterr().out


def test_help_loads_nothing_heavy():
    code = "from epd.cli import main\ntry:\n  main(['--help'])\nexcept SystemExit: pass\nprint()"
    assert loaded_after(f"import contextlib, io\nwith contextlib.redirect_stdout(io.StringIO()):\n{indent(code)}") == []


def indent(code):
    return "\n".join(f"  {line}" for line in code.splitlines())


def test_importing_epd_loads_nothing_heavy():
    assert loaded_after("import epd") == []


def test_what_the_client_offers_is_offered_by_epd():
    assert set(epd.client.__all__) == set(epd.__all__) - {"__version__"}
    assert epd.Client is epd.client.Client
    assert set(epd.__all__) <= set(dir(epd))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = epd.nothing


def test_version_is_that_of_the_distribution(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert (stopped.value.code, capsys.readouterr().out) == (0, f"epd {epd.__version__}\n")


def test_engine_options_go_to_all_stages_or_to_one():
    config = configure(
        "up", "--model", "org/name", "--engine", "max-model-len=4096", "--engine", "dtype=bfloat16",
        "--decode-engine", "max_num_seqs=64", "--prefill-engine", "limit_mm_per_prompt.image=4", "--encode", "3",
    )  # fmt: skip
    assert config.model == "org/name"
    assert config.engine == {"max_model_len": 4096, "dtype": "bfloat16"}
    assert config.engine_options("decode") == {"max_model_len": 4096, "dtype": "bfloat16", "max_num_seqs": 64}
    assert config.prefill.engine == {"limit_mm_per_prompt": {"image": 4}}
    assert (config.encode.workers, config.prefill.workers) == (3, 1)


def test_options_win_over_set_and_set_wins_over_the_file(tmp_path):
    file = tmp_path / "epd.toml"
    file.write_text('model = "a"\n[endpoint]\nport = 1\nhost = "h"\nmax_images = 2\n')
    config = configure("up", "--config", str(file), "--set", "endpoint.port=2", "--set", "model=b", "--port", "3")
    assert (config.model, config.endpoint.port, config.endpoint.host) == ("b", 3, "h")


def test_odd_model_names_survive():
    assert configure("up", "--model", "C:\\it's").model == "C:\\it's"


def test_a_daemon_can_be_given_the_whole_configuration_as_json(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(dump(Config(model="m")))
    assert configure("broker", "--config", str(file)).model == "m"
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json"):
        configure("broker", "--config", str(file))


def test_the_broker_address_is_an_option_of_each_daemon():
    assert configure("worker", "--stage", "encode", "--broker", "tcp://b:1").broker.address == "tcp://b:1"


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["up", "--set", "endpoint.colour=1"], "Object contains unknown field `colour` - at `$.endpoint`"),
        (["up", "--set", "endpoint"], "'endpoint': expected section.key=value"),
        (["up", "--engine", "dtype"], "engine option 'dtype': expected KEY=VALUE"),
        (["up", "--config", "/no/such.toml"], "/no/such.toml: [Errno 2] No such file or directory"),
        (["up", "--model", "/no/model"], "model /no/model: no such folder"),
        (["worker", "--stage", "encode", "--model", "./no"], "model ./no: no such folder"),
        (["broker", "--broker", "tcp://no-such-interface:1"], "cannot listen on tcp://no-such-interface:1"),
    ],
)
def test_mistakes_are_one_line_and_status_2(argv, sentence, capsys):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    assert line.startswith(f"epd {argv[0]}: ")
    assert sentence in line


@pytest.mark.parametrize(
    "argv", [["up", "--encode", "0"], ["up", "--port", "70000"], ["worker"], ["worker", "--stage", "x"], ["no"], []]
)
def test_wrong_usage_is_status_2(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_configuring_takes_what_a_subcommand_has():
    args = argparse.Namespace(config=None, set=["model=m"])
    assert options.configure(args).model == "m"

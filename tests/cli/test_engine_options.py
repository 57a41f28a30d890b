"""Engine options are taken as `vllm serve` takes them, and wrong ones are one line, before anything is loaded."""

import dataclasses
import subprocess
import sys
import time
import types
import typing
from pathlib import Path

import pytest

from epd.cli import build_parser, options
from epd.config import Config, ConfigError, EndpointConfig, StageConfig, load
from epd.local.engine_options import checked, settle
from epd.local.engine_source import SERVE, Option, options_of

ROOT = Path(__file__).resolve().parent.parent.parent


def engine(*given):
    """What becomes of `--engine` options."""
    argv = [word for option in given for word in ("--engine", option)]
    return checked(options.configure(build_parser("up").parse_args(["up", *argv]))).engine


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ('limit_mm_per_prompt={"image":16}', {"limit_mm_per_prompt": {"image": 16}}),
        ('--limit-mm-per-prompt={"image": 16, "video": 0}', {"limit_mm_per_prompt": {"image": 16, "video": 0}}),
        ("limit_mm_per_prompt={image=16}", {"limit_mm_per_prompt": {"image": 16}}),
        ("limit_mm_per_prompt.image=16", {"limit_mm_per_prompt": {"image": 16}}),
        ('hf_overrides={"a": [true, null]}', {"hf_overrides": {"a": [True, None]}}),
        ("max_model_len=8k", {"max_model_len": 8000}),
        ("max_model_len=8K", {"max_model_len": 8192}),
        ("max_num_batched_tokens=25.6k", {"max_num_batched_tokens": 25_600}),
        ("max_model_len=auto", {"max_model_len": -1}),
        ("enforce_eager=True", {"enforce_eager": True}),
        ("enforce_eager=false", {"enforce_eager": False}),
        ("gpu_memory_utilization=1", {"gpu_memory_utilization": 1}),
        ("max_num_seqs=16.0", {"max_num_seqs": 16}),
        ("revision=123", {"revision": "123"}),
        ("quantization=None", {"quantization": None}),
        ("max_lora_rank=16", {"max_lora_rank": 16}),
        ("allowed_media_domains=a.org,b.org", {"allowed_media_domains": ["a.org", "b.org"]}),
        ("dtype=bfloat16", {"dtype": "bfloat16"}),
        ("kv_cache_dtype=fp8", {"kv_cache_dtype": "fp8"}),
    ],
)
def test_what_vllm_serve_takes_is_taken(given, taken):
    assert engine(given) == taken


def test_json_in_a_file_is_taken_too(tmp_path):
    file = tmp_path / "epd.toml"
    file.write_text("""[engine]\nlimit_mm_per_prompt = '{"image": 3}'\n[decode.engine]\nmax_num_seqs = "1k"\n""")
    config = checked(load(file))
    assert (config.engine, config.decode.engine) == ({"limit_mm_per_prompt": {"image": 3}}, {"max_num_seqs": 1000})


WRONG = [
    ("dtpye=float32", "engine option 'dtpye': vLLM has no such option; did you mean 'dtype'?"),
    ("max-model-length=1", "vLLM has no such option; did you mean 'max_model_len'?"),
    ("tensor_paralel_size=2", "did you mean 'tensor_parallel_size'?"),
    ("qqqq=2", "engine option 'qqqq': vLLM has no such option"),
    ("dtype=float31", "dtype=float31: must be one of auto, half, float16, bfloat16, float, float32; did you mean 'flo"),
    ("runner=generation", "did you mean 'generate'?"),
    ("gpu_memory_utilization=1.5", "gpu_memory_utilization=1.5: must be at most 1"),
    ("gpu_memory_utilization=0", "must be more than 0"),
    ("tensor_parallel_size=0", "must be at least 1"),
    ("max_model_len=long", "max_model_len=long: must be a whole number"),
    ("max_num_seqs=1.5", "must be a whole number"),
    ("enforce_eager=maybe", "must be true or false"),
    ("limit_mm_per_prompt=16", "must be a table or JSON object"),
    ("limit_mm_per_prompt=[16]", "must be a table or JSON object"),
    ('limit_mm_per_prompt={"image":16', "neither JSON"),
    ('compilation_config={"modee": 3}', "'modee' is not known to vLLM; did you mean 'mode'?"),
]


@pytest.mark.parametrize(("given", "sentence"), WRONG)
def test_what_vllm_does_not_take_is_said_with_what_is_nearest(given, sentence):
    with pytest.raises(ConfigError) as refused:
        engine(given)
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("stage", ["encode", "prefill", "decode"])
def test_options_of_a_stage_are_checked_and_named(stage):
    section = type(getattr(Config(), stage))(engine={"dtpye": "float32"})
    with pytest.raises(ConfigError, match=f"{stage} engine option 'dtpye'"):
        checked(Config(**{stage: section}))
    assert isinstance(section, StageConfig)


def test_options_of_the_server_are_checked_against_its_own():
    good = {"tool_call_parser": "hermes", "ssl_keyfile": "k", "enable_log_requests": True, "max_log_len": 10}
    assert checked(Config(endpoint=EndpointConfig(serve=good))).endpoint.serve == good
    for wrong, right in (("tool_call_parsr", "tool_call_parser"), ("enable_log_request", "enable_log_requests")):
        with pytest.raises(ConfigError, match=rf"\[endpoint\.serve\] '{wrong}'.*did you mean '{right}'"):
            checked(Config(endpoint=EndpointConfig(serve={wrong: True})))


@pytest.mark.parametrize(
    "argv",
    [
        ["up"],
        ["worker", "--stage", "decode"],
        ["endpoint", "--port", "0"],
        ["models", "check", "builtin"],
        ["demo"],
    ],
    ids=lambda argv: argv[0],
)
def test_every_command_with_an_engine_ends_at_once_with_one_line_and_status_2(argv):
    started = time.monotonic()
    command = [sys.executable, "-m", "epd.cli", *argv, "--set", "engine.dtpye=float32"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    took_s = time.monotonic() - started
    assert (ended.returncode, ended.stdout) == (2, "")
    [line] = ended.stderr.splitlines()
    assert line == f"epd {argv[0]}: engine option 'dtpye': vLLM has no such option; did you mean 'dtype'?"
    assert took_s < 5.0


def test_without_vllm_options_are_passed_on_as_they_are(monkeypatch):
    monkeypatch.setattr("epd.local.engine_options.options_of", lambda what: {})
    assert checked(Config(engine={"dtpye": 1})).engine == {"dtpye": 1}


def test_a_type_that_is_not_understood_is_left_to_vllm():
    anything = Option(kinds=frozenset({"any", "None"}))
    assert [settle(anything, value) for value in ("x", 1, {"a": 1})] == ["x", 1, {"a": 1}]


# --- the contract with vLLM 0.32: what is read of its source is what its classes say


def test_the_options_are_vllms():
    from vllm.engine.arg_utils import EngineArgs

    names = {field.name for field in dataclasses.fields(EngineArgs) if not field.name.startswith("_")}
    assert set(options_of()) == names, "vLLM's EngineArgs are written otherwise now: see epd/local/engine_source.py"


def test_the_options_of_the_server_are_vllms():
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())
    names = {action.dest for action in parser._actions if action.option_strings} - {"help"}
    assert names <= set(options_of(SERVE))


def test_choices_and_plain_types_are_vllms():
    from vllm.engine.arg_utils import EngineArgs

    hints = typing.get_type_hints(
        EngineArgs, localns={"QuantizationConfigArgs": dict}
    )  # imported for type checkers only
    differing = {}
    for name, option in options_of().items():
        if "any" in option.kinds:
            continue
        kinds, choices = set(), set()
        for part in flat(hints[name]):
            if typing.get_origin(part) is typing.Literal:
                choices |= set(flat_literals(part))
            elif part in (bool, int, float, str):
                kinds.add(part.__name__)
            elif part is type(None):
                kinds.add("None")
            else:
                kinds.add("list" if (typing.get_origin(part) or part) in (list, set, tuple) else "table")
        if (kinds, choices) != (set(option.kinds), set(option.choices)):
            differing[name] = (kinds, choices, option)
    assert not differing


def test_what_is_left_to_vllm_is_little():
    left = {name for name, option in options_of().items() if "any" in option.kinds}
    assert len(left) <= 12, left


def flat(hint):
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return [each for part in typing.get_args(hint) for each in flat(part)]
    return [hint]


def flat_literals(hint):
    for each in typing.get_args(hint):
        yield from flat_literals(each) if typing.get_origin(each) is typing.Literal else [each]

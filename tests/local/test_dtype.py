"""The number type of a pipeline on a CPU: from what `/proc/cpuinfo` says, the model, and what the user has chosen."""

import json

import pytest

from epd.builtin import model_path
from epd.config import Config, StageConfig
from epd.local import LocalPipeline, dtype
from epd.local.environment import resolve_model

# Shortened: the lines that decide, as Linux writes them.
CPUS = {
    "an x86 with AVX2 only": "processor\t: 0\nflags\t\t: fpu sse4_2 avx avx2 fma bmi2\n",
    "an x86 with AVX-512 but no bfloat16": "flags\t\t: avx2 avx512f avx512bw avx512_vnni\nbugs\t\t: bf16\n",
    "an Arm without it": "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd fphp asimddp sve\n",
}
WITH_BFLOAT16 = {
    "Cooper Lake, Zen 4": "flags\t\t: avx2 avx512f avx512_bf16\n",
    "AMX": "flags\t\t: avx2 avx512f amx_tile amx_bf16\n",
    "Neoverse V1": "Features\t: fp asimd sve bf16 i8mm\n",
    "a file that says nothing": "processor\t: 0\nvendor_id\t: ?\n",
    "an empty file": "",
}


@pytest.fixture
def host(monkeypatch, tmp_path):
    """Makes this host one without CUDA and with a `/proc/cpuinfo` of this text."""

    def become(cpuinfo, cuda=False):
        (tmp_path / "cpuinfo").write_text(cpuinfo)
        monkeypatch.setattr(dtype, "_CPUINFO", tmp_path / "cpuinfo")
        monkeypatch.setattr(dtype, "has_cuda", lambda: cuda)

    return become


@pytest.fixture
def model(tmp_path):
    """Writes a model's configuration; returns its folder."""

    def write(**config):
        folder = tmp_path / "model"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        return str(folder)

    return write


@pytest.mark.parametrize("cpuinfo", CPUS.values(), ids=CPUS)
def test_a_cpu_without_bfloat16_computes_in_float32_and_says_so(host, cpuinfo):
    host(cpuinfo)
    config, note = dtype.for_this_host(Config(engine={"max_model_len": 512}))
    assert config.engine == {"max_model_len": 512, "dtype": "float32"}
    assert "float32" in note and "--engine dtype=bfloat16" in note
    assert resolve_model(config).engine["dtype"] == "float32"


@pytest.mark.parametrize("cpuinfo", WITH_BFLOAT16.values(), ids=WITH_BFLOAT16)
def test_a_cpu_with_bfloat16_and_one_that_does_not_say_are_left_alone(host, cpuinfo):
    host(cpuinfo)
    assert dtype.for_this_host(Config()) == (Config(), "")
    assert resolve_model(Config()).engine["dtype"] == "bfloat16"


def test_a_host_with_a_gpu_is_left_alone(host):
    host(CPUS["an x86 with AVX2 only"], cuda=True)
    assert dtype.for_this_host(Config()) == (Config(), "")


@pytest.mark.parametrize(
    "config",
    [
        Config(engine={"dtype": "bfloat16"}),
        Config(engine={"dtype": "auto"}),
        Config(decode=StageConfig(engine={"dtype": "half"})),
    ],
    ids=["bfloat16", "auto", "of one stage"],
)
def test_what_the_user_has_chosen_wins(host, config):
    host(CPUS["an x86 with AVX2 only"])
    assert dtype.for_this_host(config) == (config, "")


OWN = {
    "quantized": {"dtype": "bfloat16", "quantization_config": {"quant_method": "awq"}},
    "a quantized text model": {"text_config": {"dtype": "bfloat16", "quantization_config": {"quant_method": "awq"}}},
    "with a recurrent state": {"text_config": {"layer_types": ["linear_attention", "full_attention"]}},
    "in float16": {"torch_dtype": "float16"},
    "in float32": {"dtype": "float32"},
}


@pytest.mark.parametrize("config", OWN.values(), ids=OWN)
def test_a_model_that_is_not_in_bfloat16_or_needs_its_own_type_is_left_alone(host, model, config):
    host(CPUS["an x86 with AVX2 only"])
    given = Config(model=model(**config))
    assert dtype.for_this_host(given) == (given, "")


def test_a_model_of_ones_own_in_bfloat16_computes_in_float32(host, model):
    host(CPUS["an x86 with AVX2 only"])
    config, note = dtype.for_this_host(Config(model=model(torch_dtype="bfloat16")))
    assert config.engine == {"dtype": "float32"} and note


def test_a_model_that_is_not_on_this_host_yet_is_left_alone(host):
    host(CPUS["an x86 with AVX2 only"])
    given = Config(model="nobody/no-such-model")
    assert dtype.for_this_host(given) == (given, "")


def test_a_pipeline_gives_all_its_daemons_the_same_type_and_leaves_its_callers_configuration_alone(host):
    host(CPUS["an x86 with AVX2 only"])
    given = Config(model=str(model_path()))
    pipeline = LocalPipeline(given)
    assert pipeline.note == dtype.NOTE
    assert {pipeline.config.engine_options(stage)["dtype"] for stage in ("encode", "prefill", "decode")} == {"float32"}
    assert given.engine == {}

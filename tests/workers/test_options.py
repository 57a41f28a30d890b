"""What vLLM refuses of a worker's options, when it is asked, is one line without a traceback."""

import pytest

from epd import builtin
from epd.config import Config, ConfigError
from epd.messages import Stage
from workers.options import vllm_config

WRONG = [
    ({"quantization": "fp9"}, "fp9"),
    ({"attention_backend": "NOPE"}, "Unknown attention backend: 'NOPE'"),
    ({"max_model_len": 10**9}, "max_model_len"),
    ({"dtype": "float31"}, "float31"),
    ({"no_such_option": 1}, "no_such_option"),
    ({"max_num_batched_tokens": -5}, "-5"),
]


@pytest.mark.parametrize("role", [Stage.ENCODE, Stage.PREFILL])
@pytest.mark.parametrize(("engine", "sentence"), WRONG, ids=lambda value: str(value))
def test_what_vllm_refuses_is_one_line(engine, sentence, role):
    with pytest.raises(ConfigError) as refused:
        vllm_config(Config(model=str(builtin.model_path()), engine=engine), role, "worker")
    said = str(refused.value)
    assert sentence in said
    assert "\n" not in said
    assert "pydantic.dev" not in said

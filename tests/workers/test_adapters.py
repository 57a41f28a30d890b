"""What an engine calls its adapters."""

import pytest

pytestmark = pytest.mark.engine


def asked(name, number, path):
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=name, lora_int_id=number, lora_path=path)


def test_adapters_of_two_endpoints_with_the_same_number_are_told_apart():
    from workers.adapters import Adapters

    adapters = Adapters()
    here, there = adapters.own(asked("red", 1, "/a/red")), adapters.own(asked("blue", 1, "/a/blue"))
    assert here.lora_int_id != there.lora_int_id
    assert (here.lora_path, there.lora_path) == ("/a/red", "/a/blue")
    again = adapters.own(asked("red", 7, "/a/red"))
    assert again.lora_int_id == here.lora_int_id and again == here


def test_adapters_with_the_same_name_and_another_path_are_told_apart_in_one_batch():
    from workers.adapters import Adapters

    adapters = Adapters()
    old, new = adapters.own(asked("red", 1, "/v1/red")), adapters.own(asked("red", 1, "/v2/red"))
    assert old.lora_int_id != new.lora_int_id
    assert len({old, new}) == 2, "vLLM keeps the adapters of a batch in a set"


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_only_engines_with_a_language_model_get_adapters(role):
    from epd.config import Config, ConfigError
    from epd.messages import Role
    from workers.engine import engine_options

    config = Config(model="m", engine={"enable_lora": True, "max_loras": 4})
    assert engine_options(config, Role(role), "w")["enable_lora"] is True
    assert engine_options(config, Role.ENCODE, "w")["enable_lora"] is False
    config.engine["enable_tower_connector_lora"] = True
    with pytest.raises(ConfigError, match="language model"):
        engine_options(config, Role(role), "w")

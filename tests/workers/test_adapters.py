"""What an engine calls its adapters."""

import pytest

pytestmark = pytest.mark.engine


def asked(name, number, path):
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name=name, lora_int_id=number, lora_path=path)


class Core:
    """An engine core that reads what has "red" in its path."""

    def __init__(self):
        self.loaded = []

    def list_loras(self):
        return set(self.loaded)

    def add_lora(self, lora_request):
        if "red" not in lora_request.lora_path:
            raise ValueError("not here")
        self.loaded.append(lora_request.lora_int_id)
        return True


def request(lora_request):
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    return EngineCoreRequest("r", [1], None, SamplingParams(), None, 0.0, lora_request, None, None)


def test_adapters_of_two_endpoints_with_the_same_number_are_told_apart():
    from workers.adapters import Adapters

    adapters = Adapters(Core())
    here, there = adapters.own(asked("red", 1, "/a/red")), adapters.own(asked("blue", 1, "/a/blue"))
    assert here.lora_int_id != there.lora_int_id
    assert (here.lora_path, there.lora_path) == ("/a/red", "/a/blue")
    again = adapters.own(asked("red", 7, "/a/red"))
    assert again.lora_int_id == here.lora_int_id and again == here


def test_adapters_with_the_same_name_and_another_path_are_told_apart_in_one_batch():
    from workers.adapters import Adapters

    adapters = Adapters(Core())
    old, new = adapters.own(asked("red", 1, "/v1/red")), adapters.own(asked("red", 1, "/v2/red"))
    assert old.lora_int_id != new.lora_int_id
    assert len({old, new}) == 2, "vLLM keeps the adapters of a batch in a set"


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_only_engines_with_a_language_model_get_adapters(role):
    from epd.config import Config, ConfigError
    from epd.messages import Stage
    from workers.options import engine_options

    config = Config(model="m", engine={"enable_lora": True, "max_loras": 4})
    assert engine_options(config, Stage(role), "w")["enable_lora"] is True
    assert engine_options(config, Stage.ENCODE, "w")["enable_lora"] is False
    config.engine["enable_tower_connector_lora"] = True
    with pytest.raises(ConfigError, match="language model"):
        engine_options(config, Stage(role), "w")


def test_an_adapter_is_read_with_its_first_request_and_again_once_the_engine_has_dropped_it():
    from workers.adapters import Adapters

    core = Core()
    adapters = Adapters(core)
    assert adapters.prepare(request(None)).lora_request is None
    for number in (1, 5):
        assert adapters.prepare(request(asked("red", number, "/a/red"))).lora_request.lora_int_id == 1
    assert core.loaded == [1]
    core.loaded.clear()
    adapters.prepare(request(asked("red", 1, "/a/red")))
    assert core.loaded == [1]
    with pytest.raises(ValueError, match="not here"):
        adapters.prepare(request(asked("blue", 1, "/a/blue")))


@pytest.mark.parametrize("spared", [True, False])
def test_in_a_batch_with_adapters_the_requests_without_get_nothing_added(spared):
    """Where vLLM alone does so, `spare_base_requests` can go."""
    import torch
    from vllm.lora.ops.torch_ops import lora_ops

    from workers.adapters import spare_base_requests

    spare_base_requests()
    spare_base_requests()
    expand = lora_ops.bgmv_expand if spared else lora_ops.bgmv_expand.spares
    weights = torch.stack([torch.full((4, 2), 1.0), torch.full((4, 2), 10.0)])
    output = torch.zeros(3, 4)
    expand(torch.ones(3, 2), weights, output, torch.tensor([0, -1, 1]), True)
    assert output[:, 0].tolist() == [2.0, 0.0 if spared else 20.0, 20.0]

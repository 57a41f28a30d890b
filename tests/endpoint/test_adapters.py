"""Which adapters the endpoint offers."""

import json

import pytest

from epd.process.lifecycle import Life
from tests.pipeline.adapters import write_adapter

from .fake_broker import FakeBroker
from .serving import ENGINE, config_for

pytestmark = pytest.mark.engine


def checks(engine):
    from epd.endpoint.engine.adapters import AdapterChecks
    from epd.endpoint.http.options import serve_args, vllm_config_of

    made = AdapterChecks()
    made._vllm_config = vllm_config_of(serve_args(config_for("tcp://x:1", engine)))
    return made


@pytest.fixture(scope="module")
def enabled():
    return checks(ENGINE | {"enable_lora": True, "max_lora_rank": 8})


def request(path, **more):
    from vllm.lora.request import LoRARequest

    return LoRARequest(lora_name="red", lora_int_id=1, lora_path=str(path), **more)


async def test_an_adapter_that_fits_is_offered(enabled, tmp_path):
    assert await enabled.add_lora_async(request(write_adapter(tmp_path / "red", 1)))
    assert await enabled.remove_lora_async(1)


async def test_a_folder_without_weights_or_configuration_is_not_found(enabled, tmp_path):
    from vllm.exceptions import LoRAAdapterNotFoundError

    folder = write_adapter(tmp_path / "red", 1)
    (folder / "adapter_model.safetensors").unlink()
    for path in (folder, tmp_path / "nowhere"):
        with pytest.raises(LoRAAdapterNotFoundError):
            await enabled.add_lora_async(request(path))


@pytest.mark.parametrize(
    ("rank", "changes", "words"), [(16, {}, "rank"), (8, {"use_dora": True}, "DoRA"), (8, {"r": 0}, "positive")]
)
async def test_an_adapter_that_no_worker_could_load_is_refused_with_the_reason(enabled, tmp_path, rank, changes, words):
    folder = write_adapter(tmp_path / "red", 1, rank, **changes)
    with pytest.raises(ValueError, match=words):
        await enabled.add_lora_async(request(folder))


async def test_a_configuration_that_is_not_json_is_refused(enabled, tmp_path):
    folder = write_adapter(tmp_path / "red", 1)
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(json.JSONDecodeError):
        await enabled.add_lora_async(request(folder))


async def test_loading_other_weights_under_the_same_name_is_refused(enabled, tmp_path):
    with pytest.raises(ValueError, match="another name"):
        await enabled.add_lora_async(request(write_adapter(tmp_path / "red", 1), load_inplace=True))


async def test_without_enable_lora_nothing_is_offered(tmp_path):
    with pytest.raises(ValueError, match="enable_lora"):
        await checks(ENGINE).add_lora_async(request(write_adapter(tmp_path / "red", 1)))


async def test_an_endpoint_whose_adapter_is_missing_does_not_start_and_says_so(tmp_path, capfd):
    from epd.endpoint.daemon import main

    engine = ENGINE | {"enable_lora": True}
    async with FakeBroker() as broker:
        config = config_for(broker.address, engine, serve={"lora_modules": [f"red={tmp_path}/nowhere"]})
        assert await main(config, "endpoint-0", Life()) == 2
    assert "Loading lora red failed" in "".join(capfd.readouterr()), "vLLM hides the path"

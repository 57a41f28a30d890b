"""What is refused of models with a recurrent state, and what of vLLM that rests on. No engine."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from epd.builtin import model_path
from epd.config import Config, ConfigError
from tests.models import tiles

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]
_NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder: Path = tmp_path_factory.mktemp("models")
    tiles.minicpmv(folder)
    return Config(model=str(folder), engine={"max_model_len": 2048})


@pytest.fixture(scope="module")
def ordinary() -> Config:
    return Config(model=str(model_path()), engine={"max_model_len": 1024})


def request_of(num_tokens: int, **sampling: Any) -> Any:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    return EngineCoreRequest(
        request_id="one", prompt_token_ids=[7] * num_tokens, mm_features=None, arrival_time=0.0, lora_request=None,
        sampling_params=SamplingParams(**sampling), pooling_params=None, cache_salt=None, data_parallel_rank=None,
    )  # fmt: skip


def test_a_recurrent_state_is_told_from_vllms_configuration(recurrent: Config, ordinary: Config) -> None:
    from epd.endpoint.http.options import serve_args, vllm_config_of
    from epd.multimodal.recurrent import has_recurrent_state

    assert has_recurrent_state(vllm_config_of(serve_args(recurrent)))
    assert not has_recurrent_state(vllm_config_of(serve_args(ordinary)))


@pytest.mark.parametrize("asked", [{"prompt_logprobs": 1}, {"prompt_logprob_token_ids": [3]}])
def test_prompt_logprobs_are_refused_with_a_recurrent_state_only(asked: dict[str, Any]) -> None:
    from vllm.exceptions import VLLMValidationError

    from epd.endpoint.engine.submission import check_request

    check_request(request_of(9, **asked))
    check_request(request_of(9), recurrent=True)
    with pytest.raises(VLLMValidationError, match=r"prompt_logprobs.*recurrent state"):
        check_request(request_of(9, **asked), recurrent=True)


@pytest.mark.parametrize("num_tokens", [1, 2])
def test_a_prompt_that_leaves_prefill_one_token_is_refused_with_a_recurrent_state_only(num_tokens: int) -> None:
    from vllm.exceptions import VLLMValidationError

    from epd.endpoint.engine.submission import check_request

    check_request(request_of(num_tokens))
    check_request(request_of(3), recurrent=True)
    with pytest.raises(VLLMValidationError, match="at least 3 tokens"):
        check_request(request_of(num_tokens), recurrent=True)


def test_speculative_decoding_is_refused_with_a_recurrent_state_only(recurrent: Config, ordinary: Config) -> None:
    from epd.messages import Stage
    from workers.options import vllm_config

    for config in (recurrent, ordinary):
        config.decode.engine = {"speculative_config": _NGRAM}
    assert vllm_config(ordinary, Stage.DECODE, "d").speculative_config is not None
    assert vllm_config(recurrent, Stage.PREFILL, "p").speculative_config is None
    with pytest.raises(ConfigError, match="recurrent state"):
        vllm_config(recurrent, Stage.DECODE, "d")


def test_vllm_leaves_the_last_token_to_decode_except_for_prompt_logprobs() -> None:
    """Where it leaves it out for them too, they need not be refused."""
    from vllm.distributed.kv_transfer.kv_connector.v1.nixl.base_scheduler import NixlBaseConnectorScheduler

    source = inspect.getsource(NixlBaseConnectorScheduler)
    assert "1 if self._has_mamba or" in source
    truncate = inspect.getsource(NixlBaseConnectorScheduler._truncate_request_for_prefill)
    assert "not request.get_skip_reading_prefix_cache()" in truncate
    assert "_truncate_request_for_prefill(request)" in inspect.getsource(NixlBaseConnectorScheduler.on_new_request)

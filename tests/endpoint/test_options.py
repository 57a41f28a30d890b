"""From the configuration to the arguments of `vllm serve`."""

import pytest

from epd.config import Config, ConfigError, EndpointConfig

from .serving import ENGINE, MODEL, config_for

pytestmark = pytest.mark.engine


def args_of(engine=ENGINE, **endpoint):
    from epd.endpoint.http.options import serve_args

    return serve_args(config_for("tcp://x:1", engine, **endpoint))


def test_engine_serve_and_endpoint_options_reach_vllm():
    args = args_of(
        serve={"allowed_origins": ["*"], "enable_request_id_headers": True, "middleware": ["a.b", "c.d"]},
        api_keys=["one", "two"],
        max_images=5,
        max_videos=2,
        max_audios=3,
        allowed_media_domains=["a.example"],
        port=1234,
    )
    assert args.model == MODEL and args.served_model_name == ["digits"] and args.max_model_len == 1024
    assert args.enforce_eager and args.enable_request_id_headers and args.api_key == ["one", "two"]
    assert args.allowed_origins == ["*"] and args.middleware == ["a.b", "c.d"]
    assert args.allowed_media_domains == ["a.example"] and args.port == 1234
    assert args.mm_processor_cache_type == "lru" and args.limit_mm_per_prompt == {"image": 5, "video": 2, "audio": 3}


def test_the_users_limit_of_items_stays():
    assert args_of(ENGINE | {"limit_mm_per_prompt": {"image": 2}}).limit_mm_per_prompt == {"image": 2}


def test_false_switches_off():
    assert args_of(ENGINE | {"enable_prefix_caching": False}).enable_prefix_caching is False
    assert args_of(ENGINE | {"enforce_eager": False}).enforce_eager is False


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ({"no_such_option": 1}, "no_such_option"),
        ({"max_model_len": "many"}, "max-model-len"),
        ({"headless": True}, "headless"),
        ({"dtype": "int3"}, "dtype"),
    ],
)
def test_wrong_options_are_named(engine, words):
    with pytest.raises(ConfigError, match=words):
        args_of(engine)


def test_serve_options_are_checked_as_vllm_does():
    with pytest.raises(ConfigError, match="tool-call-parser"):
        args_of(serve={"enable_auto_tool_choice": True})


def test_a_model_is_needed():
    from epd.endpoint.http.options import serve_args

    with pytest.raises(ConfigError, match="model"):
        serve_args(Config(endpoint=EndpointConfig()))


def mrope_model(folder, kind, architecture, **vision):
    """The configuration of a model with M-RoPE, without weights or tokenizer."""
    import transformers

    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    text = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 128, "rope_parameters": rope,
    }  # fmt: skip
    made = getattr(transformers, kind)(text_config=text, vision_config=vision, architectures=[architecture])
    made.save_pretrained(folder)
    return Config(model=str(folder), engine={"skip_tokenizer_init": True})


def test_a_model_with_mrope_whose_positions_are_known_is_taken(tmp_path):
    from epd.endpoint.http.options import serve_args, vllm_config_of

    config = mrope_model(
        tmp_path, "Qwen2VLConfig", "Qwen2VLForConditionalGeneration", depth=1, embed_dim=32, hidden_size=64, num_heads=2
    )
    assert vllm_config_of(serve_args(config)).model_config.uses_mrope


def test_another_model_with_mrope_is_refused_with_the_reason(tmp_path):
    from epd.endpoint.http.options import serve_args, vllm_config_of

    config = mrope_model(
        tmp_path, "Glm4vConfig", "Glm4vForConditionalGeneration", depth=1, hidden_size=32, num_heads=2,
        out_hidden_size=64,
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"Glm4v.*M-RoPE.*only known of Qwen2VL"):
        vllm_config_of(serve_args(config))


def test_pruning_of_videos_is_refused_for_models_with_mrope(tmp_path):
    from epd.endpoint.http.options import serve_args, vllm_config_of

    config = mrope_model(
        tmp_path, "Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration", depth=1, hidden_size=32, num_heads=2,
        out_hidden_size=64,
    )  # fmt: skip
    config.engine = config.engine | {"video_pruning_rate": 0.5}
    with pytest.raises(ConfigError, match="video_pruning_rate"):
        vllm_config_of(serve_args(config))


def test_a_model_that_is_not_there_is_an_error_with_its_name():
    from epd.endpoint.http.options import serve_args, vllm_config_of

    with pytest.raises(ConfigError, match="/no/such/model"):
        vllm_config_of(serve_args(Config(model="/no/such/model")))


def test_adapters_of_the_language_model_are_taken_and_those_of_the_tower_refused():
    from epd.endpoint.http.options import vllm_config_of

    lora = ENGINE | {"enable_lora": True, "max_lora_rank": 8}
    args = args_of(lora, serve={"lora_modules": ["red=/adapters/red", "blue=/adapters/blue"]})
    assert [(one.name, one.path) for one in args.lora_modules] == [("red", "/adapters/red"), ("blue", "/adapters/blue")]
    assert vllm_config_of(args).lora_config.max_lora_rank == 8
    with pytest.raises(ConfigError, match="enable_tower_connector_lora"):
        vllm_config_of(args_of(lora | {"enable_tower_connector_lora": True}))

"""From the pipeline's configuration to the arguments of `vllm serve`.

Lives in the endpoint process; pure. A part of the server, written against vLLM 0.32
(`vllm.entrypoints.launchers.cli_args`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any, NoReturn

from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser

from epd.config import Config, ConfigError
from epd.endpoint.engine.adapters import check_options
from epd.errors import one_line
from epd.multimodal.positions import UnsupportedModelError, positions_for

# These say how vLLM would start processes and sockets; here that is the pipeline's business.
_NOT_OURS = ("headless", "api_server_count", "grpc", "uds", "data_parallel_size", "host", "port", "model")


class _Parser(FlexibleArgumentParser):
    """vLLM's parser, with errors as exceptions."""

    def error(self, message: str) -> NoReturn:
        """Raises an exception instead of ending the process."""
        raise ConfigError(f"vLLM options: {message}")


def serve_args(config: Config) -> argparse.Namespace:
    """The arguments that `vllm serve` would have for this configuration.

    Raises:
        ConfigError: vLLM does not know an option, or it is not the endpoint's to set.
    """
    if not config.model:
        raise ConfigError("model: not set")
    counts = {"image": config.endpoint.max_images, "video": config.endpoint.max_videos}
    options: dict[str, Any] = {"limit_mm_per_prompt": counts | {"audio": config.endpoint.max_audios}}
    options |= config.engine_options("") | config.endpoint.serve
    wrong = sorted(set(_NOT_OURS) & set(options))
    if wrong:
        raise ConfigError(f"[endpoint.serve] and [engine] cannot set {', '.join(wrong)}")
    # "lru" only counts what is cached; the cache itself is `epd.endpoint.media.processor_cache`, of the user's size.
    options |= {"model": config.model, "mm_processor_cache_type": "lru"}
    if config.served_model_name:
        options["served_model_name"] = [config.served_model_name]
    if config.endpoint.api_keys:
        options["api_key"] = config.endpoint.api_keys
    if config.endpoint.allowed_media_domains:
        options["allowed_media_domains"] = config.endpoint.allowed_media_domains
    if config.endpoint.allowed_local_media_path:
        options["allowed_local_media_path"] = config.endpoint.allowed_local_media_path
    parser = make_arg_parser(_Parser())
    args: argparse.Namespace = parser.parse_args(_argv(parser, options))
    args.host, args.port = config.endpoint.host, config.endpoint.port
    try:
        validate_parsed_serve_args(args)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"vLLM options: {one_line(error)}") from None
    return args


def vllm_config_of(args: argparse.Namespace) -> VllmConfig:
    """The vLLM configuration for a model that the pipeline can serve.

    Raises:
        ConfigError: it cannot serve the model, or a feature that is turned on.
    """
    try:
        config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        raise ConfigError(f"{args.model}: {one_line(error)}") from error
    model = config.model_config
    try:
        positions_for(config)
    except UnsupportedModelError as error:
        raise ConfigError(f"{args.model}: {error}") from None
    if model.is_encoder_decoder or model.runner_type != "generate":
        raise ConfigError(f"{args.model}: only decoder models that generate text are supported")
    check_options(config)
    if config.speculative_config is not None:
        raise ConfigError("speculative decoding is not the endpoint's: set it in [decode.engine]")
    return config


def _argv(parser: argparse.ArgumentParser, options: Mapping[str, Any]) -> list[str]:
    argv: list[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        action = parser._option_string_actions.get(flag)
        if action is None:
            raise ConfigError(f"vLLM options: unknown option {name!r}")
        if value is None:
            continue
        if isinstance(value, bool) and action.nargs == 0:
            no_flag = "--no-" + name.replace("_", "-")
            if value:
                argv.append(flag)
            elif no_flag in parser._option_string_actions:
                argv.append(no_flag)
        elif isinstance(value, list | tuple) and action.nargs in ("+", "*"):
            argv += [flag, *map(str, value)]
        elif isinstance(value, list | tuple) and isinstance(action, argparse._AppendAction):
            argv += [f"{flag}={each}" for each in value]
        elif isinstance(value, dict | list | tuple):
            argv.append(f"{flag}={json.dumps(value)}")
        else:
            argv.append(f"{flag}={value}")
    return argv

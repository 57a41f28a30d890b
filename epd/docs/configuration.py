"""The page `docs/configuration.md`, from `epd.config`; only the text between the facts is here.

Lives in a developer's process; pure.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterable
from typing import Any

import msgspec

from epd import config
from epd.docs.parts import default, doc, note

_CONFIGURATION = """\
# Configuration

One TOML file configures all daemons of a pipeline: `epd up --config epd.toml`, with the same option for `epd broker`,
`epd cache`, `epd endpoint` and `epd worker`. Every key has a default. An unknown key or a wrong type is an error, and
the daemon does not start. [examples/systemd/epd.toml](../examples/systemd/epd.toml) is a commented example.

Single values can be set on the command line and override the file: `--set SECTION.KEY=VALUE`, with the value in TOML or
JSON (a bare word is a string), e.g. `--set broker.max_queued=64`. `--engine KEY=VALUE` is short for
`--set engine.KEY=VALUE` and accepts what `vllm serve` accepts: `--engine 'limit_mm_per_prompt={"image": 16}'`, `8k`.
`epd up` also has `--encode-engine`, `--prefill-engine` and `--decode-engine`.

`epd up` chooses the broker's address itself (a socket in its run directory), so `broker.address` has no effect there.

## Engine options
`[engine]` holds vLLM's engine options for all stages and for the endpoint; `[encode.engine]`, `[prefill.engine]` and
`[decode.engine]` hold those of one stage and take precedence. Names are those of `vllm serve --help` with underscores.
`[endpoint.serve]` takes other options of `vllm serve` for the HTTP server (tool parsers, TLS, CORS and the like). Names
and values that vLLM does not accept are refused before anything is loaded, with the nearest valid one.

EPD sets these itself and refuses or overrides them: `ec_transfer_config`, `kv_transfer_config`, `mm_encoder_only` and
`mm_processor_cache_gb` of the workers, `enable_prefix_caching` and `enable_lora` of encode workers,
`limit_mm_per_prompt` of prefill and decode workers, and for the endpoint `mm_processor_cache_type`, `model`, `host`,
`port`, `uds`, `headless`, `grpc`, `api_server_count` and `data_parallel_size`. On CPUs a worker's KV cache has 256 MiB
unless `kv_cache_memory_bytes` says otherwise.

## Environment variables
| variable | read by | meaning |
|---|---|---|
| `EPD_API_KEY` | `epd ask`, `epd cache ls` | the key that they send |
| `LISTEN_PID`, `LISTEN_FDS` | endpoint | a listening socket from systemd, instead of host and port |
| `NOTIFY_SOCKET` | all daemons | where systemd hears that they are ready |
| `EPD_HOST` | cache, all workers | the host's name instead of the system's; one name for all that share `/dev/shm` |
| `EPD_PORT_FILE` | endpoint | a file to write the port to once it listens |
| `VLLM_NIXL_SIDE_CHANNEL_HOST` | prefill, decode worker | vLLM's: where its NIXL connector listens |
| `VLLM_NIXL_SIDE_CHANNEL_PORT` | prefill, decode worker | vLLM's: the port for that |

Each prefill and decode worker of a host needs its own side channel port; `epd up` chooses them.

vLLM's other variables work as always. `epd` sets `VLLM_ENABLE_V1_MULTIPROCESSING=0`, `VLLM_NO_USAGE_STATS=1`,
`VLLM_LOGGING_LEVEL`, `TOKENIZERS_PARALLELISM`, for a model in a folder `HF_HUB_OFFLINE=1`, without a GPU
`OMP_NUM_THREADS=1` and `VLLM_CPU_OMP_THREADS_BIND=nobind`, and in the endpoint `VLLM_MAX_IMAGE_PIXELS`,
`VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB` and `VLLM_MEDIA_URL_ALLOW_REDIRECTS=0`, unless they are set already. It
always sets `VLLM_SSM_CONV_STATE_LAYOUT=DS`, which KV pushes of models with a recurrent state need.
"""


def configuration() -> str:
    """The page `docs/configuration.md`."""
    lines = [note("epd/config.py"), _CONFIGURATION, "## Top level", "", doc(config.Config), ""]
    sections: list[tuple[str, Any]] = []
    top = []
    for field in msgspec.structs.fields(config.Config):
        if inspect.isclass(field.type) and issubclass(field.type, msgspec.Struct):
            sections.append((field.name, field.type))
        else:
            top.append(field)
    lines += _keys(top)
    for name, struct in sections:
        base = struct.__mro__[1]
        more = [] if base.__name__.startswith("_") else [doc(base), ""]
        text = doc(struct).removeprefix(f"`[{name}]`: ")
        lines += [f"## `[{name}]`", "", *more, text[:1].upper() + text[1:], "", *_keys(msgspec.structs.fields(struct))]
    return "\n".join(lines)


_TOML_TYPES = {str: "string", int: "integer", float: "number", bool: "true or false"}


def _keys(fields: Iterable[Any]) -> list[str]:
    rows = [f"| `{field.name}` | {_toml_type(field.type)} | {default(field)} |" for field in fields]
    return ["| key | type | default |", "|---|---|---|", *rows, ""]


def _toml_type(kind: Any) -> str:
    if typing.get_origin(kind) is dict:
        return "table"
    if typing.get_origin(kind) is list:
        return f"list of {_toml_type(typing.get_args(kind)[0])}s"
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(f'"{value}"' for value in typing.get_args(kind))
    return _TOML_TYPES[kind]

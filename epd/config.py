"""The configuration of a whole pipeline: one TOML file that every daemon reads, with command line overrides.

Pure. `[engine]` holds vLLM engine options for all stages, `[encode.engine]`, `[prefill.engine]` and `[decode.engine]`
those of one stage; their names are vLLM's own (`vllm serve --help`), with underscores.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any, Literal

import msgspec

# By these names the broker finds its policies (`broker.policies`).
OrderName = Literal["fcfs", "sjf", "edf"]
ChoiceName = Literal["least_loaded", "round_robin", "affine"]
EncodeChoiceName = Literal["least_loaded", "round_robin"]  # an encode worker keeps nothing of what it has encoded


class ConfigError(ValueError):
    """The configuration is not valid; the text names the place."""


class _Section(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Base of all sections: unknown keys are errors."""


class BrokerConfig(_Section):
    """`[broker]`: where it listens and what it admits.

    `decode_reserve_tokens` is how many output tokens are set aside in a decode worker's KV cache for a request, even if
    its output may be longer. Uploads may pin `upload_fraction` of the cache. Up to `pixel_store_bytes` of pixels are
    kept to encode patches again. Up to `max_queued` requests wait for a place, each for at most `max_queue_s` seconds;
    beyond that the answer is 503.

    A request that loses workers is tried `max_attempts` times in total. Requests and uploads wait for a stage (or the
    cache) that has been absent for less than `absence_grace_s`; 0 refuses them at once. A worker that holds something,
    but whose engine makes no step for `hung_after_s`, is taken for lost, and ends itself.

    `request_order` and `patch_order` choose the next of a tenant's requests and patches: "fcfs" (first come, first
    served), "sjf" (shortest job first) or "edf" (earliest deadline first); tenants take turns under any of them.
    `encode_choice`, `prefill_choice` and `decode_choice` choose the worker of each stage: "least_loaded" (in estimated
    seconds once workers have reported what their work costs, else in tokens), "round_robin", or, except for encode,
    "affine" (the worker that has had the same patches and beginning of a prompt before, unless it is much busier).

    `record` is a folder where the broker records what it sees, for `epd replay`: no pixels and no prompts, but the
    token ids of answers. A recording ends after `record_bytes`; as much is kept of earlier ones.
    """

    address: str = "tcp://127.0.0.1:5840"
    heartbeat_s: float = 1.0
    lost_after_s: float = 3.5
    max_queued: int = 512
    max_queue_s: float = 60.0
    max_in_flight: int = 1024
    max_frames_bytes: int = 4 << 30
    decode_reserve_tokens: int = 1024
    encode_batches_ahead: int = 2
    story_keep: int = 1000
    upload_fraction: float = 0.5
    pixel_store_bytes: int = 256 << 20
    max_attempts: int = 3
    absence_grace_s: float = 30.0
    hung_after_s: float = 60.0
    request_order: OrderName = "fcfs"
    patch_order: OrderName = "fcfs"
    encode_choice: EncodeChoiceName = "least_loaded"
    prefill_choice: ChoiceName = "least_loaded"
    decode_choice: ChoiceName = "least_loaded"
    record: str = ""
    record_bytes: int = 1 << 30


class CacheConfig(_Section):
    """`[cache]`: the pool of embeddings. `checksum` verifies every read of a slot.

    `address` is where the cache daemon serves its pool to workers on other hosts (`tcp://HOST:PORT`); HOST must be a
    name or address of this host that they know. If it is empty, only workers on its own host use the pool. Pools in GPU
    memory cannot be served.
    """

    pool_bytes: int = 256 << 20
    kind: str = "shared_memory"
    checksum: bool = True
    address: str = ""


class EndpointConfig(_Section):
    """`[endpoint]`: the HTTP server and what it accepts from clients.

    `allowed_media_domains` lists the hosts that media may be fetched from; if it is empty, only data URLs are accepted.
    `max_pixels` limits one picture, `max_body_bytes` one HTTP body, and `max_images`, `max_videos` and `max_audios` the
    media of one request. Up to `max_video_frames` frames of a video are sampled; it may have `max_video_pixels` in a
    frame and be `max_video_s` seconds long (at full HD and 30 frames a second; larger ones less). Audio may be
    `max_audio_s` long. When decoded, one clip may take `max_decoded_bytes`, all media of a request
    `max_request_decoded_bytes` (three bytes a pixel, four a sample), and those of all requests that are being processed
    `max_total_decoded_bytes`: beyond that, requests wait for those before them. Fetching, decoding and processing may
    each take `media_timeout_s`; then the request ends with 400 `media_timeout`.

    With `warm_up` the endpoint sends the first requests itself, and is ready after them. Pictures uploaded to
    `/v1/media` are kept for `media_ttl_s` seconds, up to `media_max_per_key` for each API key and up to `media_bytes`
    in total, as the processor outputs them. While there is no broker, requests in flight and up to `max_waiting` new
    ones wait for one for `broker_wait_s` seconds. To be sent again they are held, in up to `max_held_bytes`: beyond
    that a request is held only until its first token, and ends with `broker_lost` if the broker dies later. A stream
    ends with `slow_client` when its client leaves `max_unread_bytes` of engine output unread. The HTTP bodies of all
    current requests may take `max_bodies_bytes`; beyond that the answer is 503.
    """

    host: str = "127.0.0.1"
    port: int = 8400
    max_body_bytes: int = 64 << 20
    max_bodies_bytes: int = 1 << 30
    max_images: int = 32
    max_pixels: int = 64 << 20
    max_videos: int = 8
    max_video_frames: int = 768
    max_video_pixels: int = 4096 * 2304
    max_video_s: float = 600.0
    max_audios: int = 32
    max_audio_s: float = 600.0
    max_decoded_bytes: int = 1 << 30
    max_request_decoded_bytes: int = 1 << 30
    max_total_decoded_bytes: int = 2 << 30
    media_timeout_s: float = 30.0
    allowed_media_domains: list[str] = []
    allowed_local_media_path: str = ""
    request_timeout_s: float = 600.0
    warm_up: bool = True
    drain_s: float = 30.0
    api_keys: list[str] = []
    media_ttl_s: float = 300.0
    media_max_per_key: int = 64
    media_bytes: int = 512 << 20
    broker_wait_s: float = 30.0
    max_waiting: int = 256
    max_held_bytes: int = 2 << 30
    max_unread_bytes: int = 4 << 20
    serve: dict[str, Any] = {}


class StageConfig(_Section):
    """`[encode]`, `[prefill]`, `[decode]`: how many workers `epd up` starts, and their vLLM engine options.

    A worker that is asked to stop finishes what it has within `drain_s` seconds; what is left goes on elsewhere.
    """

    workers: int = 1
    drain_s: float = 10.0
    engine: dict[str, Any] = {}


class PrefillConfig(StageConfig):
    """`[prefill]`: `min_overlap_tokens` is the shortest run of ready tokens worth a step while patches are missing."""

    min_overlap_tokens: int = 512


class LogConfig(_Section):
    """`[log]`: `level` as in logging; `format` is "console" or "json"."""

    level: str = "info"
    format: str = "console"


class Config(_Section):
    """A whole pipeline."""

    model: str = ""
    served_model_name: str = ""
    engine: dict[str, Any] = {}
    broker: BrokerConfig = msgspec.field(default_factory=BrokerConfig)
    cache: CacheConfig = msgspec.field(default_factory=CacheConfig)
    endpoint: EndpointConfig = msgspec.field(default_factory=EndpointConfig)
    encode: StageConfig = msgspec.field(default_factory=StageConfig)
    prefill: PrefillConfig = msgspec.field(default_factory=PrefillConfig)
    decode: StageConfig = msgspec.field(default_factory=StageConfig)
    log: LogConfig = msgspec.field(default_factory=LogConfig)

    def engine_options(self, stage: str) -> dict[str, Any]:
        """The vLLM options of a stage ("encode", "prefill", "decode", or "" for the endpoint's own configuration)."""
        return self.engine | (getattr(self, stage).engine if stage else {})


def load(path: str | Path | None, overrides: list[str] | None = None) -> Config:
    """Reads a TOML file (or nothing) and applies `overrides` of the form `section.key=value` (in TOML or JSON).

    Raises:
        ConfigError: the file or an override cannot be read, or has an unknown key or a wrong type.
    """
    tree: dict[str, Any] = {}
    if path:
        try:
            tree = tomllib.loads(Path(path).read_text())
        except (OSError, tomllib.TOMLDecodeError) as error:
            raise ConfigError(f"{path}: {error}") from None
    for override in overrides or []:
        _apply(tree, override)
    try:
        return msgspec.convert(tree, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error)) from None


def dump(config: Config) -> str:
    """`config` as JSON, for handing a whole configuration to a child process."""
    return msgspec.json.encode(config).decode()


def parse(text: str) -> Config:
    """The inverse of `dump`."""
    return msgspec.json.decode(text, type=Config)


def _value(text: str, override: str) -> Any:
    """A value in TOML, or in JSON if it is an object or an array, as `vllm serve` takes them; else a bare word."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        if not text.strip().startswith(("{", "[")):
            return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{override!r}: neither JSON ({error}) nor TOML") from None


def _apply(tree: dict[str, Any], override: str) -> None:
    key, found, text = override.partition("=")
    if not found:
        raise ConfigError(f"{override!r}: expected section.key=value")
    value = _value(text, override)
    *path, last = key.strip().replace("-", "_").split(".")
    for name in path:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{override!r}: {name} is not a section")
    tree[last] = value

"""The options that most subcommands share, and how they become one `epd.config.Config`.

Lives in the command line's process; pure but for reading the configuration file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from epd.config import Config, ConfigError, load, parse

LEVELS = ("debug", "info", "warning", "error")


def add_common(parser: argparse.ArgumentParser, *, model: bool = True) -> None:
    """Adds --config, --set, --log-level, --log-format and, if an engine is involved, --model and --engine."""
    group = parser.add_argument_group("configuration")
    group.add_argument("--config", metavar="FILE", help="TOML file that all daemons read")
    group.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override one value; may be repeated"
    )
    group.add_argument("--log-level", choices=LEVELS, help="how much is logged (default: info)")
    group.add_argument("--log-format", choices=("console", "json"), help="for people (default) or programs")
    if model:
        group.add_argument(
            "--model",
            metavar="DIR_OR_NAME",
            help="a folder, a name on the Hugging Face Hub, or (default) `builtin`",
        )
        group.add_argument(
            "--engine",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="vLLM engine option for all stages, e.g. max_model_len=8192; may be repeated",
        )


def add_daemon(parser: argparse.ArgumentParser) -> None:
    """Adds the options of single daemons: --name and --broker."""
    parser.add_argument("--name", help="stable name of this daemon (default: its role or stage)")
    parser.add_argument("--broker", metavar="ADDRESS", help="the broker's ZeroMQ address, e.g. tcp://10.0.0.1:5840")


def add_listen(parser: argparse.ArgumentParser) -> None:
    """Adds where the endpoint listens."""
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=_port, help="port to listen on, 0 for any (default: 8400)")


def add_stages(parser: argparse.ArgumentParser) -> None:
    """Adds numbers of workers and engine options by stage."""
    group = parser.add_argument_group("stages")
    for stage in ("encode", "prefill", "decode"):
        group.add_argument(f"--{stage}", type=_count, metavar="N", help=f"number of {stage} workers (default: 1)")
    for stage in ("encode", "prefill", "decode"):
        group.add_argument(
            f"--{stage}-engine",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help=f"vLLM engine option for {stage} workers",
        )


def configure(args: argparse.Namespace) -> Config:
    """Returns the configuration that a command line asks for: the file, then --set, then the other options.

    Raises:
        ConfigError: it cannot be read or is wrong.
    """
    options = vars(args)
    overrides = list(args.set)
    for option, key in (
        ("log_level", "log.level"),
        ("log_format", "log.format"),
        ("broker", "broker.address"),
        ("host", "endpoint.host"),
        ("port", "endpoint.port"),
        ("model", "model"),
    ):
        if options.get(option) is not None:
            overrides.append(f"{key}={_toml(options[option])}")
    for stage in ("encode", "prefill", "decode"):
        if isinstance(count := options.get(stage), int):
            overrides.append(f"{stage}.workers={count}")
        overrides += [_engine(f"{stage}.engine", each) for each in options.get(f"{stage}_engine") or []]
    overrides += [_engine("engine", each) for each in options.get("engine") or []]
    if args.config and Path(args.config).suffix == ".json" and not overrides:
        return _read_json(Path(args.config))
    return load(args.config, overrides)


def _read_json(path: Path) -> Config:
    """What `epd up` hands to its own daemons."""
    try:
        return parse(path.read_text())
    except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
        raise ConfigError(f"{path}: {error}") from None


def _engine(section: str, option: str) -> str:
    key, found, _ = option.partition("=")
    if not found or not key.strip():
        raise ConfigError(f"engine option {option!r}: expected KEY=VALUE")
    return f"{section}.{option.removeprefix('--')}"


def _toml(value: object) -> str:
    return str(value) if isinstance(value, int) else f"'''{value}'''"


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of workers")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port")
    return int(text)

"""The command line: `epd up`, the daemons one by one, `epd ask`, `epd demo`.

Lives in whatever process the user or systemd starts; the one place that knows all packages. Only the module of the
subcommand that was asked for is imported, so that `epd --help` is immediate.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

__all__ = ["main"]

USAGE, INTERRUPTED = 2, 130

# Subcommand -> module below epd.cli with its add_parser, and the line in `epd --help`.
COMMANDS: dict[str, tuple[str, str]] = {
    "up": ("up", "run a whole pipeline on this host"),
    "demo": ("demo", "run a pipeline with the built-in model and show what it does"),
    "models": ("models", "say what a model's pictures, videos and sounds are cut into"),
    "ask": ("ask", "ask a running endpoint a question, with or without pictures, videos and sounds"),
    "replay": ("replay", "replay what a broker has recorded"),
    "memory": ("memory", "show what a model needs on one GPU, by stage"),
    "endpoint": ("daemons", "run the HTTP endpoint"),
    "broker": ("daemons", "run the broker"),
    "cache": ("daemons", "run the cache daemon, or show a running pipeline's pools (`epd cache ls`)"),
    "worker": ("daemons", "run a worker of one stage"),
}


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object, **__: object) -> None:
        from epd import __version__

        print(f"epd {__version__}")
        parser.exit()


def build_parser(command: str | None) -> argparse.ArgumentParser:
    """Returns the parser with all subcommands; only `command` has its options."""
    parser = argparse.ArgumentParser(
        prog="epd",
        description="Serve large multimodal models with encode, prefill and decode on separate vLLM workers.",
        epilog="`epd COMMAND --help` shows a command's options. Configuration: one TOML file for all daemons.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    loaded: set[str] = set()
    for name, (module, line) in COMMANDS.items():
        if command not in COMMANDS or COMMANDS[command][0] != module:
            subparsers.add_parser(name, help=line)
        elif module not in loaded:
            loaded.add(module)
            importlib.import_module(f"epd.cli.{module}").add_parser(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand.

    Returns:
        The exit status: 0 when all went well, 2 for a wrong command line or configuration.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = next((word for word in arguments if not word.startswith("-")), None)
    args = build_parser(command).parse_args(arguments)
    from epd.config import ConfigError

    try:
        status: int = args.run(args)
    except ConfigError as error:
        print(f"epd {args.command}: {error}", file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    return status

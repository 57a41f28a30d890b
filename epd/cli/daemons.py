"""`epd endpoint`, `epd broker`, `epd cache`, `epd worker`: one daemon each, as a systemd unit runs it.

Lives in that daemon's process; hands over to it at once.
"""

from __future__ import annotations

import argparse
import importlib

from epd.cli import options
from epd.config import Config
from epd.process import activation

STAGES = ("encode", "prefill", "decode")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the four daemons to the command line."""
    lines = {
        "endpoint": "Run the HTTP endpoint: vLLM's OpenAI API in front of a broker.",
        "broker": "Run the broker, which decides what each worker does next.",
        "cache": "Run the cache daemon, which owns the embeddings' memory.",
        "worker": "Run a worker of one stage: one vLLM engine.",
    }
    for name, line in lines.items():
        parser = subparsers.add_parser(name, help=line.lower().rstrip("."), description=line)
        if name == "worker":
            parser.add_argument("--stage", choices=STAGES, required=True, help="what it does")
        if name == "cache":
            parser.add_argument(
                "action", nargs="?", choices=("ls",), help="`ls`: show a running pipeline's pools instead"
            )
            parser.add_argument("--url", default="http://127.0.0.1:8400", help="for ls: the endpoint (%(default)s)")
        options.add_daemon(parser)
        if name == "endpoint":
            options.add_listen(parser)
        options.add_common(parser, model=name in ("endpoint", "worker"))
        parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the daemon until SIGTERM; returns its exit status."""
    if getattr(args, "action", None) == "ls":
        from epd.cli import cache_ls

        return cache_ls.run(args.url)
    from epd.local import engine_options, environment, extras

    config = options.configure(args)
    name = args.name or (args.stage if args.command == "worker" else args.command)
    if args.command in ("endpoint", "worker"):
        extras.need(extras.ENGINE)
        config = engine_options.checked(environment.resolve_model(config))
        environment.set_engine_environment(config.model, config.log.level)
    if args.command == "endpoint" and not activation.is_offered():
        environment.listen(config.endpoint.host, config.endpoint.port).close()
    environment.end_with_supervisor()
    environment.title(f"epd {name}")
    return _run_daemon(args, config, name)


def _run_daemon(args: argparse.Namespace, config: Config, name: str) -> int:
    if args.command == "worker":
        from workers import daemon as worker

        return worker.run(config, args.stage, name)
    packages = {"endpoint": "epd.endpoint", "broker": "broker", "cache": "cache"}
    return int(importlib.import_module(f"{packages[args.command]}.daemon").run(config, name))

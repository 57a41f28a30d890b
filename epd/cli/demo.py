"""`epd demo`: see `epd.demo`. Lives in the user's process; owns nothing but the exit status."""

from __future__ import annotations

import argparse
import asyncio
import sys

from epd.cli import options

OK, FAILED = 0, 1


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``demo`` to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="run a pipeline with the built-in model and show what it does",
        description="Start a pipeline with the built-in model, have it read a picture, show which worker did what and "
        "when, and compare with plain vLLM. Takes about half a minute and needs no GPU and no network.",
    )
    parser.add_argument("--encode", type=int, default=2, metavar="N", help="number of encode workers (default: 2)")
    parser.add_argument("--port", type=int, default=0, help="port to listen on (default: any)")
    parser.add_argument("--no-compare", action="store_true", help="leave plain vLLM out")
    parser.add_argument("--verbose", action="store_true", help="also show the daemons' logs")
    options.add_common(parser, model=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs the demo; returns 0 if the answer was the truth."""
    config = options.configure(argparse.Namespace(**{**vars(args), "encode": None}))
    config.model = "builtin"
    from epd.client import EPDError
    from epd.demo.run import Demo
    from epd.local import StartError
    from epd.local.display import PatientConsole

    demo = Demo(config, PatientConsole(), encode=args.encode, compare=not args.no_compare, verbose=args.verbose)
    try:
        return OK if asyncio.run(demo.run()) else FAILED
    except (EPDError, StartError) as error:
        print(f"epd demo: {error}", file=sys.stderr)
        return FAILED

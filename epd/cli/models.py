"""`epd models check`: whether the pipeline serves a model, and what its items can be cut into.

Lives in the user's process, which builds an encode engine as a worker does.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

from epd.cli import options

if TYPE_CHECKING:
    from rich.table import Table

    from epd.config import Config
    from epd.local.examine import Examination

REFUSED = 1


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `models` to the command line."""
    line = "Look at models: `epd models check NAME_OR_DIR`."
    text = "say what a model's pictures, videos and sounds are cut into"
    parser = subparsers.add_parser("models", help=text, description=line)
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    check = actions.add_parser(
        "check",
        help="prove on an encode engine what a model's items can be cut into",
        description="Build an encode engine and prove what the model's pictures, videos and sounds can be spread over "
        "encode workers by: tiles, frames, chunks, or nothing smaller than the item. Ends with 1 where EPD refuses "
        "the model.",
    )
    check.add_argument("model", metavar="NAME_OR_DIR", help="a folder, a name on the Hugging Face Hub, or `builtin`")
    check.add_argument("--json", action="store_true", help="print one JSON object")
    check.add_argument(
        "--engine", action="append", default=[], metavar="KEY=VALUE", help="vLLM engine option; may be repeated"
    )
    options.add_common(check, model=False)
    check.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints what was found; returns 1 if the model is refused."""
    from epd.local import engine_options, environment, extras
    from epd.process import logs

    config = options.configure(args)
    extras.need(extras.ENGINE)
    config = engine_options.checked(environment.resolve_model(config))
    environment.set_engine_environment(config.model, config.log.level)
    logs.configure(config.log, "check")
    told = _examined(config)
    if args.json:
        print(json.dumps(told.as_json(), indent=2))
    else:
        if told.refused:
            print(f"refused: {told.refused}")
        if told.modalities:
            from epd.local.display import PatientConsole

            PatientConsole().print(table(told))
    return REFUSED if told.refused else 0


def _examined(config: Config) -> Examination:
    """The examination's result; what vLLM prints meanwhile goes to standard error."""
    from epd.local.examine import examine

    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        return examine(config)
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def table(told: Examination) -> Table:
    """The modalities as rows."""
    from rich.table import Table

    shown = Table(title=f"{told.architecture} ({told.model})", title_justify="left")
    numbers = ("pieces tried", "tokens per patch", "seconds")
    for name in ("modality", "unit", "pieces tried", "largest difference", "tokens per patch", "seconds", "remark"):
        shown.add_column(name, justify="right" if name in numbers else "left")
    for one in told.modalities:
        shown.add_row(
            one.modality,
            one.unit,
            str(one.num_pieces),
            difference(one.difference),
            str(one.tokens_per_patch),
            f"{one.seconds:.2f}",
            one.reason,
        )
    return shown


def difference(value: float | None) -> str:
    """A relative difference for people."""
    return "not measured" if value is None else "none (bit-equal)" if value == 0 else f"{value:.1e}"

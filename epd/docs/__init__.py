"""Writes the generated pages of `docs/`: `python -m epd.docs`, or `make docs`; `--check` only compares.

Lives in a developer's process; owns the pages that `pages` names. The facts come from the code; only the text between
them stands in the modules here, one for each page.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from epd.docs.configuration import configuration
from epd.docs.errors import errors
from epd.docs.metrics import metrics
from epd.docs.protocol import protocol
from epd.docs.vllm import vllm

ROOT = Path(__file__).resolve().parent.parent.parent


def pages() -> dict[Path, str]:
    """All generated pages, by path."""
    written = {
        "protocol.md": protocol(),
        "configuration.md": configuration(),
        "errors.md": errors(),
        "metrics.md": metrics(),
        "vllm.md": vllm(),
    }
    return {ROOT / "docs" / name: text for name, text in written.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the pages, or with `--check` returns 1 if one is out of date."""
    parser = argparse.ArgumentParser(prog="python -m epd.docs", description="Write the generated pages of docs/.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is out of date")
    check = parser.parse_args(argv).check
    stale = [path for path, text in pages().items() if not path.is_file() or path.read_text("utf-8") != text]
    for path in stale:
        print(f"{path.relative_to(ROOT)}: {'out of date; run `make docs`' if check else 'written'}")
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(pages()[path], "utf-8")
    return 1 if check and stale else 0

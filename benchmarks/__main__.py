"""`python -m benchmarks [KIND ...] [--json FILE]`: prints figures and ratios, and who measured where."""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks import broker, broker_daemon, cache, hashing, serve, upload
from benchmarks.common import NAME_WIDTH, Figure, provenance

KINDS = ("serve", "hash", "cache", "upload", "broker")


def main() -> int:
    """Runs the benchmarks that were asked for, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"{', '.join(KINDS)}; all by default")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    args = parser.parse_args()
    if unknown := set(args.kinds) - set(KINDS):
        parser.error(f"unknown: {', '.join(unknown)}")
    figures: list[Figure] = []
    ratios: dict[str, float] = {}
    kinds = args.kinds or KINDS
    if "hash" in kinds:
        figures += hashing.run()
    if "serve" in kinds:
        with tempfile.TemporaryDirectory() as folder:
            found, ratios = serve.run(Path(folder) / "vllm.log")
        figures += found
    if "cache" in kinds:
        found, more = cache.run()
        figures += found
        ratios |= more
    if "upload" in kinds:
        found, more = upload.run()
        figures += found
        ratios |= more
    if "broker" in kinds:
        found, more = broker.run()
        figures += [*found, *broker_daemon.run()]
        ratios |= more
    origin = provenance()
    print("  ".join(f"{key}: {value}" for key, value in origin.items()))
    for figure in figures:
        print(figure.line())
    for name, ratio in ratios.items():
        print(f"{name:<{NAME_WIDTH}} {ratio:10.2f}")
    if args.json:
        tree = {"origin": origin, "ratios": ratios, "figures": {f.name: f.values for f in figures}}
        args.json.write_text(json.dumps(tree, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

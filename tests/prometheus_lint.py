"""What `promtool check metrics` finds fault with in names, types and help; and promtool itself, if it is there.

The rules are those of Prometheus's `promlint` package.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

_TYPES = {"counter", "gauge", "histogram", "summary", "untyped"}
_ABBREVIATED = {"s", "ms", "us", "ns", "sec", "b", "kb", "mb", "gb", "tb", "pb", "m", "h", "d"}
_NOT_BASE = {"milliseconds", "microseconds", "nanoseconds", "minutes", "hours", "days", "kilobytes", "megabytes",
             "gigabytes", "bits", "kilobits", "percent"}  # fmt: skip


def complaints(families: Iterable[Metric]) -> list[str]:
    """What is wrong with these families; empty where nothing is."""
    found = []
    for family in families:
        name, words = family.name, family.name.split("_")
        samples = {sample.name for sample in family.samples}
        told = [
            (not family.documentation.strip(), "no help text"),
            (
                family.type == "counter" and any(not each.endswith("_total") for each in samples),
                "a counter without _total",
            ),
            (family.type != "counter" and name.endswith("_total"), "_total, and no counter"),
            (
                family.type in ("gauge", "counter", "unknown") and re.search("_(bucket|count|sum)$", name),
                "a reserved suffix",
            ),
            (":" in name, "a colon"),
            (name != name.lower(), "capitals"),
            (_TYPES & set(words), "its type in its name"),
            (_ABBREVIATED & set(words), "an abbreviated unit"),
            (_NOT_BASE & set(words), "no base unit"),
            (not family.samples and family.type == "counter", "no sample"),
        ]
        found += [f"{name}: {what}" for wrong, what in told if wrong]
    return found


def families_of(text: str, prefix: str = "") -> dict[str, Metric]:
    """The families of a scrape whose names begin so, by name; `_created` series are left out."""
    families = text_string_to_metric_families(text)
    return {each.name: each for each in families if each.name.startswith(prefix) and not each.name.endswith("_created")}


def check(text: str, prefix: str) -> list[str]:
    """What is wrong with the families of a scrape whose names begin with `prefix`."""
    found = complaints(families_of(text, prefix).values())
    if promtool := shutil.which("promtool"):
        lines = [line for line in text.splitlines() if re.match(rf"(# (HELP|TYPE) )?{prefix}", line)]
        command = [promtool, "check", "metrics"]
        told = subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, text=True, check=False)
        found += [line for line in (told.stdout + told.stderr).splitlines() if line.strip()]
    return found

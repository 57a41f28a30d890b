"""Virtual time: calls in order, processes that die and hang, and nothing in it that reads a wall clock."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.virtual.clock import Clock
from broker.virtual.process import Process

ROOT = Path(__file__).resolve().parent.parent.parent
# What runs in virtual time: the core and its policies, the package itself, what they use of the cache, and the stages.
FOLDERS = ("broker/core", "broker/policies", "broker/virtual")
FILES = (
    "cache/index.py", "cache/arena.py", "cache/extents.py", "cache/entries.py", "cache/eviction.py", "cache/packing.py",
    "workers/stage.py", "workers/encode.py", "workers/prefill.py", "workers/decode.py", "workers/reading.py",
    "workers/leaks.py", "workers/resources.py",
)  # fmt: skip
# Modules whose functions answer differently each time; `time.sleep` of a worker that ends answers nothing.
UNSTEADY = ("time", "datetime", "random", "secrets", "uuid", "asyncio", "threading", "os")
MAY_CALL = {"workers/encode.py": {"time.sleep"}}
# Functions without a module whose answers are of this process only.
OF_THE_PROCESS = {"id", "hash", "open", "input"}


def unsteady_calls(source: str) -> Iterator[str]:
    """Calls whose answer is not the same for the same arguments, by their full names."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            first, dot, rest = ast.unparse(node.func).partition(".")
            full = names.get(first, first) + dot + rest
            if (first in names and full.split(".")[0] in UNSTEADY) or full in OF_THE_PROCESS:
                yield full


def test_nothing_that_runs_in_virtual_time_asks_what_is_not_the_same_each_time() -> None:
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).glob("*.py"))]
    files += [ROOT / file for file in FILES]
    assert len(files) > 40
    wrong = []
    for file in files:
        path = file.relative_to(ROOT).as_posix()
        calls = set(unsteady_calls(file.read_text("utf-8"))) - MAY_CALL.get(path, set())
        wrong += [f"{path} calls {call}" for call in sorted(calls)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("import time\nnow = time.monotonic()", "time.monotonic"),
        ("from time import time as now\nnow()", "time.time"),
        ("import datetime as d\nd.datetime.now()", "datetime.datetime.now"),
        ("from random import Random\nRandom(1)", "random.Random"),
        ("key = hash('text')", "hash"),
    ],
)
def test_every_way_to_ask_is_seen(source: str, call: str) -> None:
    assert list(unsteady_calls(source)) == [call]


def test_what_is_due_is_called_by_time_and_of_equal_times_in_the_order_it_was_asked_for() -> None:
    clock, called = Clock(), []
    for name, delay_s in (("c", 2.0), ("a", 1.0), ("b", 1.0), ("now", -1.0)):
        clock.after(delay_s, lambda name=name: called.append((clock.now, name)))  # type: ignore[misc]
    clock.run(1.0)
    assert called == [(0.0, "now"), (1.0, "a"), (1.0, "b")]
    assert (clock.now, len(clock)) == (1.0, 1)
    clock.run_until_idle()
    assert called[-1] == (2.0, "c")
    assert clock.num_events == 4


def test_time_passes_until_something_holds_or_for_so_long() -> None:
    clock, called = Clock(), []
    for at_s in (1.0, 2.0, 3.0):
        clock.after(at_s, lambda: called.append(clock.now))
    assert clock.run_until(lambda: len(called) == 2, within_s=10.0)
    assert clock.now == 2.0
    assert not clock.run_until(lambda: len(called) == 9, within_s=0.5)
    assert (clock.now, called) == (2.5, [1.0, 2.0])
    assert not clock.run_until(lambda: len(called) == 9, within_s=5.0)
    assert clock.now == 7.5


def test_what_a_process_was_to_do_dies_with_it_and_waits_while_it_hangs() -> None:
    clock, did = Clock(), []
    process = Process(clock, "p", restart_s=1.0)
    process.later(2.0, lambda: did.append("of the first life"))
    clock.after(0.5, process.kill)
    clock.run(1.4)
    assert not process.alive
    clock.run(0.2)
    assert process.alive
    process.hang(2.0)
    process.later(0.1, lambda: did.append(f"at {clock.now:.1f}"))
    clock.run(5.0)
    assert did == ["at 3.6"]


def test_a_process_that_nobody_starts_again_stays_dead() -> None:
    clock = Clock()
    process = Process(clock, "p", restart_s=None)
    process.kill()
    clock.run_until_idle()
    assert not process.alive

"""What of the tests on a GPU needs none: what has to hold, the table, how children end, and where it cannot run."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import report
from tests.gpu.common import why_not
from tests.gpu.run import Children, Failed

ROOT = Path(__file__).resolve().parents[2]
VIEW = {
    "read_us_p50": 10.0,
    "read_us_p99": 12.0,
    "handover_us_p50": 90.0,
    "bytes_allocated": 0,
    "inside_pool": True,
    "slots": 1,
    "settled": 0,
}
WRITES = {"pool_gb_s": 2100.0, "plain_gb_s": 2200.0, "ratio": 0.95, "cpu_us": 40.0, "queued_in_time": True}
HANDOVER = {"writer_us_p50": 50.0, "writer_us_p99": 60.0, "total_us_p50": 100.0, "total_us_p99": 120.0}
RESULTS = {
    "machine": {"gpu": "one", "kernel": "6.8", "shm bytes": 67108864, "compute mode": "default"},
    "writes_asked": 1000,
    "correctness": {
        "writes": 1000,
        "checked": 1000,
        "mismatches": 0,
        "stale_accepted": 0,
        "stale_refused": 50,
        "waited": 990,
        "waited_for_pending": 100,
    },
    "without_events": {"mismatches": 80},
    "two_views": {"reader": {"mismatches": 0, "checked": 40, "waited_for_pending": 9}, "writer_mismatches": 0},
    "looked_at": {"mismatches": 0, "checked": 20, "waited": 0, "looks": 300},
    "reuse": {"same process": 0, "another process": 0},
    "views": {f"{size}, {state}": dict(VIEW) for size in ("5 MB", "500 MB") for state in ("unsettled", "settled")},
    "bandwidth": {"256 MiB": WRITES},
    "handover": {"events": HANDOVER},
    "device_memory_bytes": 3_000_000_000,
    "dead_writer": {"unfinished_refused": True, "settled_right": True},
    "waiting_for_a_dead_writer": {"was_waiting": True, "outcome": "stuck for 5.00 s"},
    "reader_open_ms": 1.5,
    "left_in_shared_memory": ["cuda.shm.0.1.1"],
    "took_s": 80.0,
}


@pytest.mark.parametrize(
    ("where", "value", "failing"),
    [
        (["correctness", "checked"], 999, "all writes were read"),
        (["correctness", "mismatches"], 1, "nothing read wrong"),
        (["correctness", "stale_accepted"], 1, "everything stale refused"),
        (["correctness", "stale_refused"], 49, "stale slots were tried, one for 20 writes"),
        (["looked_at", "waited"], 1, "what is looked at until it is written is read right, and waits for nothing"),
        (["looked_at", "looks"], 0, "what is looked at until it is written is read right, and waits for nothing"),
        (["correctness", "waited_for_pending"], 99, "one read in 10 waited for a pending copy"),
        (["without_events", "mismatches"], 0, "without waiting for events, data would be wrong"),
        (["two_views", "writer_mismatches"], 1, "several views of one process read right"),
        (["two_views", "reader", "mismatches"], 1, "several views of one process read right"),
        (["two_views", "reader", "waited_for_pending"], 0, "several views of one process read right"),
        (["reuse", "another process"], 1, "a slot given away anew holds what was written last"),
        (["views", "5 MB, settled", "inside_pool"], False, "every view inside the pool"),
        (["views", "5 MB, settled", "bytes_allocated"], 512, "no view allocates"),
        (["views", "500 MB, settled", "read_us_p50"], 41.0, "a settled view's time does not grow with its size"),
        (["views", "500 MB, unsettled", "read_us_p50"], 41.0, "an unsettled view's time does not grow with its size"),
        (["bandwidth", "256 MiB", "queued_in_time"], False, "the clock of each write started after all were queued"),
        (["bandwidth", "256 MiB", "ratio"], 0.89, "write bandwidth 0.9 of a plain copy (256 MiB)"),
        (["device_memory_bytes"], 4_000_000_001, "at most 4 GB of device memory"),
        (["dead_writer", "unfinished_refused"], False, "dead writer's unfinished slot refused"),
        (["dead_writer", "settled_right"], False, "dead writer's settled slot read"),
    ],
)
def test_each_check_looks_at_its_own_figure(where, value, failing):
    assert all(report.verdict(RESULTS).values())
    changed = copy.deepcopy(RESULTS)
    place = changed
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    assert [name for name, holds in report.verdict(changed).items() if not holds] == [failing]


def test_the_table_has_the_facts_of_the_machine_and_says_what_does_not_hold():
    verdict = {**report.verdict(RESULTS), "nothing read wrong": False}
    text = report.table({**RESULTS, "verdict": verdict, "passed": False})
    for part in ("compute mode   default", "stuck for 5.00 s", "/dev/shm: cuda.shm.0.1.1", "hold: nothing read wrong"):
        assert part in text


class Child:
    """A process that ends when it is told, or never."""

    pid = 7

    def __init__(self, name, ends, ended):
        self.name, self.ends, self.ended = name, ends, ended
        self.exitcode = None

    def close(self):
        self.ended.append(self.name)

    def kill(self):
        if self.ends:
            self.exitcode = -9

    def join(self, timeout):
        pass


@pytest.fixture
def children():
    made, ended = Children(), []
    for name in ("owner", "reader", "writer"):
        made._running[name] = made._connections[name] = Child(name, name != "writer", ended)
    made.ended = ended
    return made


def test_the_owner_of_the_memory_is_ended_last_and_what_cannot_be_ended_is_said(children, capsys):
    children.stop("owner")
    assert children.ended == ["writer", "reader"] and list(children._running) == ["owner"]
    assert "writer (process 7) is still there" in capsys.readouterr().err
    children.stop()
    assert children.ended == ["writer", "reader", "owner"] and not children._running


def test_a_child_that_survives_being_killed_is_a_failure(children):
    children.kill("reader")
    with pytest.raises(Failed, match=r"writer .* is still there"):
        children.kill("writer")


@pytest.mark.skipif(why_not() is None, reason="there is a GPU")
def test_without_a_gpu_it_says_why_it_cannot_run(tmp_path):
    command = [sys.executable, str(ROOT / "tests/gpu/run.py"), "--json", str(tmp_path / "results.json")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 1 and result.stderr.startswith("cannot run here: ") and not list(tmp_path.iterdir())

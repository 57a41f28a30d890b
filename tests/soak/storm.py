"""A whole soak: plain vLLM's answers first, then a pipeline and its storm, then what is left on the host."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.servers import Running, plain_vllm
from broker.recording.replay import replay
from tests.pipeline.chats import ask, tokens
from tests.soak.leftovers import descendants, pool_files, pools_of
from tests.soak.outcomes import Choices
from tests.soak.plan import Plan, make_prompts
from tests.soak.run import Result, Soak, soak_config

WORKERS = {"encode": 2, "prefill": 1, "decode": 2}


def plain_answers(prompts: list[dict[str, Any]]) -> list[Choices]:
    """What plain vLLM answers to each, one at a time."""
    with tempfile.TemporaryDirectory() as folder, plain_vllm(Path(folder) / "vllm.log") as plain:
        return [tokens(ask(plain, body)) for body in prompts]


def soak(plan: Plan) -> Result:
    """Runs a plan from beginning to end."""
    prompts = make_prompts()
    truths = plain_answers(prompts)
    before = set(descendants(os.getpid()))
    recordings = tempfile.TemporaryDirectory()
    config = soak_config()
    config.broker.record = recordings.name
    running = Running(config, restart=True, **WORKERS)
    run_dir = running.pipeline.run_dir
    pools: set[Path] = set()
    closed = False
    try:
        for prompt, truth in zip(prompts, truths, strict=True):
            answer = tokens(ask(running.http, prompt))
            assert answer == truth, f"even undisturbed: {answer} instead of {truth}"
        running.wait_idle()
        with watch_pools(running, pools):
            result = Soak(running, plan, prompts, truths).run()
        for number, (prompt, truth) in enumerate(zip(prompts, truths, strict=True)):
            answer = tokens(ask(running.http, prompt))
            if answer != truth:
                result.complaints.append(f"afterwards prompt {number} gives {answer} instead of {truth}")
        running.wait_idle()
        running.close()
        closed = True
    finally:
        if not closed:
            with contextlib.suppress(Exception):
                running.close()
    with recordings:
        result.complaints += replays(Path(recordings.name), 1 + result.faults.get("kill broker", 0))
    result.complaints += leftovers(before, run_dir, pools, running)
    return result


def replays(folder: Path, num_brokers: int) -> list[str]:
    """What is wrong with the recordings of all brokers there were, most of which were killed."""
    found = []
    files = sorted(folder.iterdir())
    if len(files) < num_brokers:
        found.append(f"{len(files)} recordings of {num_brokers} brokers")
    for path in files:
        with path.open("rb") as file:
            done = replay(file)
        if done.errors or done.first_difference:
            found.append(f"{path.name}: differs from event {done.first_difference} on; {done.errors}")
    return found


@contextlib.contextmanager
def watch_pools(running: Running, pools: set[Path]) -> Any:
    """Notes every pool that one of the pipeline's cache daemons has made."""
    changed = running.pipeline.supervisor.on_change

    def on_change(daemon: Any) -> None:
        with contextlib.suppress(OSError):
            if daemon.spec.role == "cache" and daemon.pid:
                pools.update(pools_of(daemon.pid))
        changed(daemon)

    running.pipeline.supervisor.on_change = on_change
    with contextlib.suppress(OSError):
        pools.update(pools_of(running.pid("cache")))
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            pools.update(pools_of(running.pid("cache")))
        running.pipeline.supervisor.on_change = changed


def leftovers(before: set[int], run_dir: Path, pools: set[Path], running: Running) -> list[str]:
    """What should not be there any more."""
    found = []
    deadline = time.monotonic() + 5.0
    while (left := {pid: state for pid, state in descendants(os.getpid()).items() if pid not in before}) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.1)
    if left:
        found.append(f"processes are left: {left}")
    if not running.pipeline.clean:
        ended = {name: one.how_it_ended() for name, one in running.pipeline.processes.items() if one.status != 0}
        found.append(f"the pipeline did not stop cleanly: {ended}; its logs are in {run_dir}")
    elif run_dir.exists():
        found.append(f"left: {run_dir}")
    if files := pools & pool_files():
        found.append(f"left in shared memory: {sorted(map(str, files))}")
    return found

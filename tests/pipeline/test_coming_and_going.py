"""Start, disconnect, drain: what a pipeline leaves behind, which is nothing."""

from __future__ import annotations

import concurrent.futures
import os
import tempfile
import threading
import time
from pathlib import Path

import pytest

from benchmarks.servers import Running
from epd.builtin import DEMO_QUESTION
from tests.nursery import Nursery
from tests.pipeline.chats import ask, chat, demo, scribble
from tests.pipeline.conftest import config

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]

LONG = chat("List the digits.", [scribble(7)], max_tokens=1900, ignore_eos=True, stream=True)


def metric(running: Running, name: str) -> float:
    [line] = [one for one in running.http.get("/metrics").text.splitlines() if one.startswith(f"{name} ")]
    return float(line.split()[1])


def test_a_client_that_goes_away_cancels_its_request(running: Running) -> None:
    before = metric(running, "epd_broker_cancelled_total")
    with running.http.stream("POST", "/v1/chat/completions", json=LONG) as reply:
        next(line for line in reply.iter_lines() if '"content"' in line)
    running.wait_idle(within_s=5)
    deadline = time.monotonic() + 5
    while metric(running, "epd_broker_cancelled_total") <= before:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_many_clients_that_go_away_at_any_moment_leave_nothing_held(running: Running) -> None:
    def come_and_go(seed: int) -> None:
        body = chat(DEMO_QUESTION, [scribble(seed)], stream=True, max_tokens=300, ignore_eos=True)
        with running.http.stream("POST", "/v1/chat/completions", json=body) as reply:
            lines = reply.iter_lines()
            for _ in range(seed % 7):
                next(lines, None)

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(come_and_go, range(200, 240)))
    running.wait_idle()
    ask(running.http, chat(DEMO_QUESTION, [demo()]))


def test_draining_finishes_what_runs_and_leaves_no_process_socket_or_memory_behind(nursery: Nursery) -> None:
    before, temporary = set(os.listdir("/dev/shm")), set(os.listdir(tempfile.gettempdir()))
    with nursery.away():
        running = Running(config(), encode=1, prefill=1, decode=1)
    pids = [daemon.pid for daemon in running.pipeline.processes.values()]
    run_dir: Path = running.pipeline.run_dir
    [pool] = {name for name in os.listdir("/dev/shm") if name.startswith("epd-")} - before
    text: list[str] = []
    started = threading.Event()

    def read() -> None:
        with running.http.stream("POST", "/v1/chat/completions", json=LONG | {"max_tokens": 200}) as reply:
            for line in reply.iter_lines():
                text.append(line)
                started.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert started.wait(10)
    running.run(running.pipeline.drain())
    reader.join(10)
    assert text[-2] == "data: [DONE]" or text[-1] == "data: [DONE]", text[-3:]
    assert running.pipeline.clean
    running.close()
    for pid in pids:
        assert not Path(f"/proc/{pid}").exists()
    assert not run_dir.exists()
    assert pool not in os.listdir("/dev/shm")
    left = set(os.listdir(tempfile.gettempdir())) - temporary
    assert not [name for name in left if name.startswith("vllm") or name.count("-") == 4], "vLLM's files and sockets"

"""How daemons start and stop, as their supervisors see it."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from epd.process.lifecycle import Life, first

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def told(tmp_path, monkeypatch):
    """What systemd has been told, in order; each call gives what is new."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.setblocking(False)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))

        def read():
            states = []
            while True:
                try:
                    states.append(sock.recv(100).decode())
                except BlockingIOError:
                    return states

        yield read


async def test_a_daemon_is_ready_once_and_then_stops(told):
    life = Life()
    life.ready()
    life.ready()
    assert told() == ["READY=1"]
    life.stop.set()
    assert await life.end(asyncio.Event().wait()) is False
    assert told() == ["STOPPING=1"]


async def test_what_ends_without_having_been_asked_to_is_told_from_what_was(told):
    died = asyncio.Event()
    died.set()
    assert await Life().end(died.wait()) is True
    assert told() == ["STOPPING=1"]


async def test_an_error_of_what_a_daemon_does_is_raised_where_it_waits_for_its_end(told):
    async def broken():
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        await Life().end(broken())
    assert told() == ["STOPPING=1"]


async def test_the_first_to_be_done_cancels_the_others_and_waits_for_that():
    ended = []

    async def other():
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("other")

    waiting = asyncio.create_task(other())
    await asyncio.sleep(0)
    await first(waiting, asyncio.sleep(0))
    assert ended == ["other"]


DAEMON = """
import asyncio, sys
from epd.config import LogConfig
from epd.process import lifecycle

async def main(life):
    print("up", flush=True)
    await life.end()
    print("stopping", flush=True)
    await asyncio.sleep(float(sys.argv[1]))
    return 7

sys.exit(lifecycle.run(LogConfig(), "it", main))
"""


@pytest.mark.parametrize(
    ("drain_s", "signals", "status"), [(0, 1, 7), (60, 2, 128 + signal.SIGTERM)], ids=["one", "two"]
)
def test_one_signal_drains_and_a_second_one_ends_the_process_at_once(drain_s, signals, status):
    env = {name: value for name, value in os.environ.items() if name != "NOTIFY_SOCKET"}
    command = [sys.executable, "-c", DAEMON, str(drain_s)]
    with subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None
        for number in range(signals):
            assert daemon.stdout.readline() == ("up\n", "stopping\n")[number]
            daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(10) == status

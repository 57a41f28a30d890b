"""The supervisor with light daemons: starts, crashes, restarts, orders and leftovers. Real processes, no engine."""

import asyncio
import os
import select
import shutil
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from epd.local import Spec, State, Supervisor
from epd.local.environment import make_run_directory
from epd.local.forker import ZygoteError
from tests.local.process_state import is_running

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


@pytest.fixture(autouse=True)
def stand_ins_can_be_imported(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", f"{HERE}{os.pathsep}{ROOT}")


@pytest.fixture
def run_dir():
    path = make_run_directory()
    yield path
    shutil.rmtree(path)


def forked(name, function="serve", args=(), **more):
    return Spec(name=name, role="test", target=f"stand_ins:{function}", args=list(args), **more)


def process(name, function="serve", **more):
    return Spec(name=name, role="test", argv=[sys.executable, "-m", "stand_ins", function], **more)


@asynccontextmanager
async def supervisor(run_dir, **preload):
    seen = []
    changed = asyncio.Event()

    def on_change(daemon):
        seen.append((daemon.name, daemon.state))
        changed.set()

    async def until(holds):
        async with asyncio.timeout(20):
            while not holds():
                changed.clear()
                await changed.wait()

    async with Supervisor(run_dir, preload=preload, on_change=on_change) as running:
        running.seen, running.until = seen, until
        yield running


async def ready(running, *specs):
    daemons = [await running.start(spec) for spec in specs]
    await running.until(lambda: all(daemon.state is State.READY for daemon in daemons))
    return daemons


async def test_daemons_are_ready_when_they_say_so_and_stop_with_status_0(run_dir):
    async with supervisor(run_dir) as running:
        daemons = await ready(running, process("a"), forked("b", args=["b"]))
        pids = [daemon.pid for daemon in daemons]
        assert all(is_running(pid) for pid in pids)
        assert await running.stop()
    assert [daemon.state for daemon in daemons] == [State.STOPPED] * 2
    assert not any(is_running(pid) for pid in pids)
    assert (run_dir / "b.log").read_text() == "b serves\n"
    assert not list(run_dir.glob("*.sock"))


async def test_forks_share_what_the_zygote_has_imported_and_nothing_else(run_dir, tmp_path):
    async with supervisor(run_dir, modules=["stand_ins", "random"]) as running:
        for name in "ab":
            spec = forked(name, "environment", [str(tmp_path / name)], env={"EPD_TEST": name}, once=True)
            daemon = await running.start(spec)
            await daemon.exited.wait()
            assert (daemon.state, daemon.status) == (State.STOPPED, 0)
    found = [dict(line.split("=", 1) for line in (tmp_path / name).read_text().splitlines()) for name in "ab"]
    assert [each["EPD_TEST"] for each in found] == ["a", "b"]
    assert [each["threads"] for each in found] == ["1", "1"]
    assert found[0]["random"] != found[1]["random"]


@pytest.mark.parametrize("make", [process, forked])
async def test_a_crash_is_noticed_with_its_reason_and_log(run_dir, make):
    async with supervisor(run_dir) as running:
        await running.start(make("doomed", "crash"))
        async with asyncio.timeout(20):
            daemon = await running.next_ended()
        assert (daemon.name, daemon.state) == ("doomed", State.FAILED)
        assert daemon.how_it_ended() == f"exited with status {1 if make is process else 70}"
        assert daemon.last_lines()[-1] == "RuntimeError: no such model"
        assert "the first line" in daemon.last_lines()


@pytest.mark.parametrize("make", [process, forked])
async def test_a_kill_is_noticed_and_the_daemon_can_be_restarted_by_name(run_dir, make):
    async with supervisor(run_dir) as running:
        [daemon] = await ready(running, make("a"))
        pid = daemon.pid
        running.kill("a", signal.SIGKILL)
        async with asyncio.timeout(20):
            assert await running.next_ended() is daemon
        assert daemon.how_it_ended() == "was killed by SIGKILL"
        await running.restart("a")
        await running.until(lambda: daemon.state is State.READY)
        assert (daemon.pid != pid, daemon.num_restarts) == (True, 1)
        with pytest.raises(RuntimeError, match="a runs already"):
            await running.restart("a")


async def test_crashed_daemons_come_back_when_that_is_wanted(run_dir):
    async with supervisor(run_dir) as running:
        [daemon] = await ready(running, forked("a"))
        running.restart_crashed = True
        running.kill("a")
        await running.until(lambda: daemon.num_restarts == 1 and daemon.state is State.READY)


async def test_a_killed_zygote_takes_its_forks_along_and_is_started_again(run_dir):
    async with supervisor(run_dir) as running:
        [light, heavy] = await ready(running, process("light"), forked("heavy"))
        first = await running.zygote()
        running.restart_crashed = True
        os.kill(first.pid, signal.SIGKILL)
        await running.until(lambda: heavy.num_restarts == 1 and heavy.state is State.READY)
        assert (await running.zygote()).pid != first.pid
        assert light.num_restarts == 0


async def test_what_the_zygote_cannot_import_is_the_error_of_every_start(run_dir):
    async with supervisor(run_dir, modules=["no_such_module"]) as running:
        with pytest.raises(ZygoteError, match="No module named 'no_such_module'"):
            await running.start(forked("a"))


async def test_daemons_stop_in_the_order_of_their_ranks(run_dir):
    async with supervisor(run_dir) as running:
        await ready(running, process("last", stop_rank=2), forked("first", stop_rank=0), forked("second", stop_rank=1))
        assert await running.stop()
    assert [name for name, state in running.seen if state is State.STOPPED] == ["first", "second", "last"]


async def test_a_daemon_that_does_not_stop_in_time_is_killed(run_dir):
    async with supervisor(run_dir) as running:
        [daemon] = await ready(running, forked("deaf", "stubborn", stop_s=0.2))
        assert not await running.stop()
        assert daemon.status == -signal.SIGKILL


async def test_segments_of_a_killed_cache_daemon_are_swept(run_dir):
    async with supervisor(run_dir) as running:
        [daemon] = await ready(running, process("cache", "leave_segment"))
        segment = daemon.last_lines()[0]
        running.kill("cache")
        await daemon.exited.wait()
        assert os.path.exists(segment)  # noqa: ASYNC240
    assert not os.path.exists(segment)  # noqa: ASYNC240


PARENT = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, {here!r})
import test_supervisor as tests

async def main():
    async with tests.supervisor(Path(sys.argv[1])) as running:
        specs = tests.process("light"), tests.forked("heavy"), tests.process("cache", "leave_segment")
        daemons = await tests.ready(running, *specs)
        pids = [daemon.pid for daemon in daemons] + [(await running.zygote()).pid]
        print(*pids, daemons[-1].last_lines()[0], flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


def test_nothing_is_left_when_the_supervisor_is_killed(run_dir):
    command = [sys.executable, "-c", PARENT.format(here=str(HERE)), str(run_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        *pids, segment = parent.stdout.readline().split()
        assert len(pids) == 4
        assert all(is_running(int(pid)) for pid in pids)
        parent.kill()
    wait_for_end([int(pid) for pid in pids])
    assert not Path(segment).exists()
    assert not list(run_dir.glob("*.sock"))


def wait_for_end(pids):
    """Waits for processes that are nobody's children here, so there is only asking."""
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            assert select.select([descriptor], [], [], 10)[0], f"process {pid} is still there"
        finally:
            os.close(descriptor)

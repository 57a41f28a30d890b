"""Calls that take too long: given up, replaced, counted, and nobody else waits for them."""

import asyncio
import contextlib
import threading
import time

import pytest

from epd.endpoint.media.lanes import Lane, OverdueError, StuckError

from .serving import until


@pytest.fixture
def stuck():
    """What a call waits for that does not end; it is let go at the end."""
    event = threading.Event()
    yield event
    event.set()


async def test_results_and_exceptions_come_back():
    lane = Lane("t", 2)
    assert await lane.run(lambda a, b: a + b, 1, 2, timeout_s=5) == 3
    with pytest.raises(ZeroDivisionError):
        await lane.run(lambda: 1 / 0, timeout_s=5)
    assert await asyncio.gather(*(lane.run(str, i, timeout_s=5) for i in range(50))) == [str(i) for i in range(50)]
    lane.close()


async def test_calls_run_one_after_the_other_in_one_thread():
    lane, seen = Lane("t", 1), []

    def call(i):
        seen.append((i, threading.get_ident()))

    await asyncio.gather(*(lane.run(call, i, timeout_s=5) for i in range(20)))
    assert [i for i, _ in seen] == list(range(20)) and len({thread for _, thread in seen}) == 1
    lane.close()


async def test_a_call_that_does_not_end_is_given_up_and_the_next_one_runs(stuck):
    lane = Lane("t", 1)
    first = asyncio.create_task(lane.run(stuck.wait, timeout_s=0.1))
    await asyncio.sleep(0.02)
    second = asyncio.create_task(lane.run(str, 2, timeout_s=0.1))
    with pytest.raises(OverdueError, match=r"0\.1 s"):
        await first
    assert await second == "2"  # waiting for its turn did not count
    assert lane.num_stuck == 1
    stuck.set()
    await until(lambda: lane.num_stuck == 0)
    assert await lane.run(str, 3, timeout_s=1) == "3"
    lane.close()


async def test_a_call_is_given_up_even_if_nobody_waits_for_it_any_more(stuck):
    lane = Lane("t", 1)
    first = asyncio.create_task(lane.run(stuck.wait, timeout_s=0.1))
    await asyncio.sleep(0.02)
    first.cancel()
    assert await asyncio.wait_for(lane.run(str, 2, timeout_s=1), 2) == "2"
    assert lane.num_stuck == 1
    lane.close()


async def test_a_call_that_was_cancelled_before_its_turn_never_runs(stuck):
    lane, ran = Lane("t", 1), []
    first = asyncio.create_task(lane.run(stuck.wait, timeout_s=5))
    await asyncio.sleep(0.02)
    second = asyncio.create_task(lane.run(ran.append, 2, timeout_s=5))
    await asyncio.sleep(0.02)
    second.cancel()
    stuck.set()
    assert await first is True
    assert await lane.run(str, 3, timeout_s=5) == "3" and not ran
    lane.close()


async def test_no_more_are_begun_than_may_be_stuck(stuck):
    lane = Lane("t", 1, max_stuck=2)
    for _ in range(2):
        with pytest.raises(OverdueError):
            await lane.run(stuck.wait, timeout_s=0.02)
    with pytest.raises(StuckError, match="2 calls"):
        await lane.run(str, 1, timeout_s=1)
    stuck.set()
    await until(lambda: lane.num_stuck == 0)
    assert await lane.run(str, 1, timeout_s=1) == "1"
    lane.close()


async def test_calls_that_end_at_their_deadline_leave_as_many_threads_as_there_were():
    lane = Lane("t", 1)

    for i in range(200):
        with contextlib.suppress(OverdueError):
            await lane.run(time.sleep, 0.004 + i % 5 * 0.0005, timeout_s=0.005)
        await until(lambda: lane.num_stuck == 0)
    assert sum(each.name == "t" for each in threading.enumerate()) <= 1
    lane.close()


async def test_calls_that_come_together_run_beside_each_other():
    lane, all_there = Lane("t", 4), threading.Barrier(4)
    await lane.run(str, 1, timeout_s=5)  # one thread waits by now
    await asyncio.gather(*(lane.run(all_there.wait, 5, timeout_s=6) for _ in range(4)))
    lane.close()


async def test_what_waits_is_not_begun_either_once_too_many_are_stuck(stuck):
    lane = Lane("t", 1, max_stuck=2)
    found = await asyncio.gather(*(lane.run(stuck.wait, timeout_s=0.05) for _ in range(5)), return_exceptions=True)
    assert [type(each) for each in found] == [OverdueError] * 2 + [StuckError] * 3
    lane.close()


async def test_threads_end_when_the_lane_is_closed():
    lane = Lane("t-closed", 4)
    await asyncio.gather(*(lane.run(str, i, timeout_s=5) for i in range(8)))
    lane.close()
    await until(lambda: not any(each.name == "t-closed" for each in threading.enumerate()))

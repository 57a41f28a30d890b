"""The engine thread's loop, with a stand-in for the engine."""

from __future__ import annotations

import threading
import time

from workers.thread import EngineThread


class Counting:
    """Has work while `todo` is positive; each step does one."""

    def __init__(self) -> None:
        self.todo = 0
        self.waiting = False
        self.steps: list[float] = []
        self.failure: Exception | None = None

    def start(self) -> None:
        pass

    def stop(self) -> None:
        self.todo = -1

    def has_work(self) -> bool:
        return self.todo > 0 or self.waiting

    def step(self) -> bool:
        if self.failure:
            raise self.failure
        self.steps.append(time.monotonic())
        if self.todo > 0:
            self.todo -= 1
            return True
        return False

    def held(self) -> dict[str, int]:
        return {"steps": len(self.steps)}

    def gauges(self) -> dict[str, float]:
        return {"usage": len(self.steps) / 4}

    def poll_s(self, num_idle_steps: int) -> float | None:
        return None

    def give(self, todo: int) -> None:
        self.todo += todo


def run(steps: Counting) -> tuple[EngineThread, threading.Event, list]:
    ready, exits = threading.Event(), []
    thread = EngineThread(steps, ready.set, exits.append)
    thread.start()
    assert ready.wait(5)
    return thread, ready, exits


def test_commands_run_between_steps_and_wake_the_thread() -> None:
    steps = Counting()
    thread, _, exits = run(steps)
    done = threading.Event()
    thread.call(steps.give, 3)
    thread.call(done.set)
    assert done.wait(5)
    assert thread.close(5)
    assert exits == [None]
    assert thread.num_steps in (0, 1, 2, 3)
    assert steps.todo == -1, "the engine was freed"


def test_an_idle_thread_makes_no_steps() -> None:
    steps = Counting()
    thread, _, _ = run(steps)
    time.sleep(0.1)
    assert thread.num_steps == 0
    thread.close(5)


def test_a_thread_that_waits_for_an_event_sleeps_until_a_command_comes() -> None:
    steps = Counting()
    thread, _, _ = run(steps)
    steps.waiting = True
    thread.call(lambda: None)
    time.sleep(0.1)
    assert thread.num_steps == 1, "one step finds nothing to run, then it sleeps"
    thread.call(lambda: None)
    time.sleep(0.1)
    assert thread.num_steps == 2
    thread.close(5)


def test_an_engine_that_fails_ends_the_thread_with_its_error() -> None:
    steps = Counting()
    thread, _, exits = run(steps)
    steps.failure = RuntimeError("boom")
    thread.call(steps.give, 1)
    thread.join(5)
    assert not thread.is_alive()
    assert str(exits[0]) == "boom"


def test_what_is_held_and_told_is_published_after_each_step_and_when_idle() -> None:
    steps = Counting()
    thread, _, _ = run(steps)
    published = threading.Event()

    def look() -> None:
        if thread.held == {"steps": 3} and thread.gauges == {"usage": 0.75}:
            published.set()

    thread.call(steps.give, 3)
    deadline = time.monotonic() + 10
    while not published.wait(0.01):
        assert time.monotonic() < deadline, thread.held
        thread.call(look)
    assert thread.close(5)

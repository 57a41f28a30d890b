"""What a process says it holds."""

import asyncio
import os
import threading

from epd.process import resources


async def test_tasks_threads_and_file_descriptors_are_counted_and_come_back_to_where_they_were():
    before = resources.of_process()
    read_fd, write_fd = os.pipe()
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    task = asyncio.create_task(asyncio.sleep(100))
    during = resources.of_process()
    assert {kind: during[kind] - before[kind] for kind in before} == {"tasks": 1, "threads": 1, "fds": 2}
    os.close(read_fd)
    os.close(write_fd)
    done.set()
    thread.join()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert resources.of_process() == before


async def test_a_system_that_does_not_show_file_descriptors_causes_no_error(monkeypatch):
    monkeypatch.setattr(resources, "_FDS", "/nowhere")
    assert resources.of_process()["fds"] == -1

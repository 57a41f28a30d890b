"""The events of pools in GPU memory over a fake of CUDA: the order of copies, and which event a process has already."""

import msgspec
import pytest

from cache.pools.cuda_ipc_headers import RING_EVENTS
from tests.cache.fake_cuda import Process, die, make_slot, rows

torch = pytest.importorskip("torch")

WIDE = (6, 40)  # 480 bytes of data in a slot of 768


def at(offset, generation):
    return msgspec.structs.replace(make_slot(0, generation, shape=WIDE), offset=offset)


@pytest.mark.parametrize("who", ["the same view", "another view of its process", "another process"])
@pytest.mark.parametrize(("earlier", "later"), [(0, 0), (0, 256), (256, 0)])
def test_a_copy_comes_after_a_slow_one_that_is_still_queued_for_the_same_bytes(opened, cuda, who, earlier, later):
    process = Process(cuda)
    first = opened(process)
    second = {"the same view": first, "another view of its process": opened(process)}.get(who) or opened()
    cuda.stream = "slow"
    first.write(at(earlier, generation=1), rows(1, shape=WIDE), "w-1")
    cuda.stream = "fast"
    second.write(at(later, generation=2), rows(2, shape=WIDE), "w-2")
    cuda.run("fast")
    cuda.stream = "prefill"
    embeddings = opened().read(at(later, generation=2))
    cuda.synchronize(0)
    assert torch.equal(embeddings, rows(2, shape=WIDE))


def test_an_event_that_stands_for_two_copies_is_waited_for_by_whoever_has_the_bytes_of_the_first(opened, cuda):
    writer, other = opened(), opened()
    cuda.stream = "slow"
    writer.write(make_slot(0), rows(1), "w-1")
    cuda.stream = "encode"
    for index in range(1, RING_EVENTS + 1):
        writer.write(make_slot(index), rows(2), "w-1")
    cuda.stream = "fast"
    other.write(make_slot(0, generation=2), rows(3), "w-2")
    cuda.run("fast")
    cuda.synchronize(0)
    assert torch.equal(opened().read(make_slot(0, generation=2)), rows(3))


def test_a_copy_waits_for_none_that_are_done_or_go_elsewhere(opened, cuda):
    writer, other = opened(), opened()
    writer.write(make_slot(0), rows(1), "w-1")
    cuda.synchronize(0)
    writer.write(make_slot(1), rows(1), "w-1")  # settles the first
    cuda.calls.clear()
    other.write(make_slot(0, generation=2), rows(2), "w-2")
    other.write(make_slot(2), rows(2), "w-2")
    assert cuda.calls == ["copy", "wait", "record"] * 2


def test_a_slot_that_is_written_again_and_again_waits_for_the_last_copy_only(opened, cuda):
    writer, times = opened(), 2 * RING_EVENTS
    for generation in range(times):
        writer.write(make_slot(0, generation), rows(1), "w")
    assert cuda.calls.count("wait") == 2 * times - 1  # the copy before, and the event's own previous record


def test_the_copies_of_a_dead_writer_are_not_waited_for(opened, cuda):
    dead, writer = opened(), opened()
    dead.write(make_slot(0), rows(1), "w-1")
    writer.write(make_slot(1), rows(1), "w-2")
    die(dead)
    cuda.calls.clear()
    writer.write(make_slot(0, generation=2), rows(2), "w-2")
    assert cuda.calls == ["copy", "wait", "record"]


def test_a_view_reads_what_another_view_of_its_process_wrote_without_opening_the_event(opened, cuda):
    process = Process(cuda)
    writer, reader = opened(process), opened(process)
    cuda.stream = "encode"
    writer.write(make_slot(), rows(1), "w")
    cuda.stream = "prefill"
    embeddings = reader.read(make_slot())
    cuda.run("prefill")
    assert torch.equal(embeddings, rows(1)) and "open_event" not in cuda.calls


def test_two_views_of_one_process_open_an_event_once(opened, cuda):
    writer, process = opened(), Process(cuda)
    cuda.stream = "encode"
    writer.write(make_slot(), rows(1), "w")
    for stream in ("scheduler", "runner"):
        cuda.stream = stream
        embeddings = opened(process).read(make_slot())
        assert len(cuda.queues[stream]) == 1  # it waits for the copy
    cuda.run("runner")
    assert torch.equal(embeddings, rows(1)) and cuda.calls.count("open_event") == 1

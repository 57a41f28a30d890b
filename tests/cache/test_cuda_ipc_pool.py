"""Pools in GPU memory over a fake of CUDA: what is written, read and refused, with streams that run only when told."""

import msgspec
import pytest

from cache.pools import PoolError
from cache.pools.cuda_ipc import CudaIpcPool, CudaIpcView
from cache.pools.cuda_ipc_headers import RING_EVENTS, decode_location, granule_for
from cache.pools.shared_memory import sweep_stale
from cache.slot import StaleSlotError
from tests.cache.fake_cuda import BUS_ID, MIB, die, make_slot, rows

torch = pytest.importorskip("torch")


def test_the_descriptor_says_all_that_a_worker_needs(pool, shm, cuda):
    descriptor = pool.descriptor()
    location = decode_location(descriptor.name)
    assert (descriptor.kind, descriptor.nbytes, descriptor.checksum) == ("cuda_ipc", MIB, False)
    assert (location.device, location.headers) == (BUS_ID, str(shm / "epd-g1"))
    assert descriptor.min_slot_bytes == granule_for(MIB), "the index gives no slot that could not be written"
    assert next(iter(cuda.memory.values())).nbytes == 2 * MIB  # an allocation of its own


def test_a_reader_sees_what_was_written_once_its_stream_has_waited(opened, cuda):
    writer, reader = opened(), opened()
    cuda.stream = "encode"
    writer.write(make_slot(), rows(5), "w-1")
    cuda.stream = "prefill"
    embeddings = reader.read(make_slot())
    assert not torch.equal(embeddings, rows(5))  # the copy has not run, and nothing has waited for it
    cuda.run("prefill")
    assert torch.equal(embeddings, rows(5))
    assert reader.read(make_slot()).data_ptr() == embeddings.data_ptr()  # a view of the pool, not a copy


def test_a_slot_is_checked_without_any_stream_waiting_for_it(opened, cuda):
    writer, reader = opened(), opened()
    cuda.stream = "encode"
    writer.write(make_slot(), rows(5), "w-1")
    cuda.stream = "prefill"
    cuda.calls.clear()
    assert not reader.check(make_slot())
    with pytest.raises(StaleSlotError):
        reader.check(msgspec.structs.replace(make_slot(), generation=99))
    cuda.run("encode")
    assert reader.check(make_slot())
    die(writer)
    assert reader.check(make_slot()), "who has seen it done has settled it"
    assert torch.equal(reader.read(make_slot()), rows(5))
    assert "wait" not in cuda.calls


def test_a_write_records_its_event_before_it_publishes_and_never_waits_for_the_gpu(opened, cuda):
    opened().write(make_slot(), rows(1), "w")
    assert cuda.calls == ["copy", "wait", "record"]
    assert cuda.done == {}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn"])
def test_every_type_comes_back(opened, cuda, dtype):
    writer, slot = opened(), make_slot(3, dtype=dtype)
    writer.write(slot, rows(2, dtype), "w")
    cuda.synchronize(0)
    assert torch.equal(opened().read(slot).float(), rows(2, dtype).float())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"generation": 2}, "generation 1 is here"),
        ({"generation": 0}, "generation 1 is here"),
        ({"dtype": "float16"}, "bfloat16 is here"),
        ({"num_tokens": 2}, "3 x 40 is here"),
        ({"width": 39}, "3 x 40 is here"),
        ({"owner": "other"}, "'w' wrote this"),
        ({"offset": 512}, "nothing was written here"),
        ({"offset": 256}, "nothing was written here"),
        ({"offset": 255}, "of a pool of"),
        ({"offset": MIB}, "of a pool of"),
        ({"offset": -256}, "of a pool of"),
        ({"nbytes": 128}, "which need"),
        ({"dtype": "int8"}, "embeddings of dtype"),
    ],
)
def test_a_slot_that_holds_anything_else_is_refused(opened, cuda, changes, reason):
    opened().write(make_slot(), rows(1), "w")
    with pytest.raises(StaleSlotError, match=reason):
        opened().read(msgspec.structs.replace(make_slot(), **changes))
    assert "open_event" not in cuda.calls


@pytest.mark.parametrize(
    ("slot", "data", "reason"),
    [
        (make_slot(shape=(4, 40)), rows(1), "the slot is for 4 x 40"),
        (make_slot(), rows(1, "float16"), "float16; the slot is for"),
        (make_slot(), rows(1).to_sparse(), "on the CPU"),
        (make_slot(5000), rows(1), "of a pool of"),
        (make_slot(generation=-1), rows(1), "generation"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(opened, cuda, slot, data, reason):
    view = opened()
    view.write(make_slot(), rows(7), "w")
    calls = list(cuda.calls)
    with pytest.raises(ValueError, match=reason):
        view.write(slot, data, "w")
    assert cuda.calls == calls
    cuda.synchronize(0)
    assert torch.equal(view.read(make_slot()), rows(7))


def test_a_write_that_fails_leaves_a_slot_that_nobody_reads(opened, cuda):
    view = opened()
    view.write(make_slot(), rows(1), "w")
    cuda.fail = "cudaErrorIllegalAddress"
    with pytest.raises(PoolError, match="cudaErrorIllegalAddress"):
        view.write(make_slot(), rows(2), "w")
    with pytest.raises(StaleSlotError, match="nothing was written here"):
        view.read(make_slot())


def test_an_event_that_comes_round_again_on_another_stream_covers_its_earlier_record(opened, cuda):
    writer, reader = opened(), opened()
    cuda.stream = "slow"
    writer.write(make_slot(0), rows(1), "w")
    cuda.stream = "fast"
    for index in range(1, RING_EVENTS + 1):
        writer.write(make_slot(index), rows(2), "w")
    cuda.stream = "prefill"
    embeddings = reader.read(make_slot(0))
    cuda.run("prefill")
    assert torch.equal(embeddings, rows(1))


def test_a_slot_is_settled_once_its_writer_has_seen_its_copy_done(opened, cuda):
    writer, reader = opened(), opened()
    writer.write(make_slot(0), rows(1), "w")
    writer.settle()
    reader.read(make_slot(0))
    assert cuda.calls.count("open_event") == 1
    cuda.synchronize(0)
    writer.settle()
    cuda.calls.clear()
    assert torch.equal(reader.read(make_slot(0)), rows(1)) and cuda.calls == []


def test_a_slot_written_again_on_a_slow_stream_does_not_keep_others_from_settling(opened, cuda):
    writer, reader = opened(), opened()
    cuda.stream = "fast"
    writer.write(make_slot(0), rows(1), "w")
    writer.write(make_slot(1), rows(2), "w")
    cuda.stream = "slow"
    writer.write(make_slot(0, generation=2), rows(3), "w")
    cuda.run("fast")
    writer.settle()
    cuda.calls.clear()
    reader.read(make_slot(1))
    assert "wait" not in cuda.calls
    reader.read(make_slot(0, generation=2))
    assert "wait" in cuda.calls


def test_events_are_opened_once_per_event_of_a_writer(opened, cuda):
    writer, reader = opened(), opened()
    for generation in range(1, 3 * RING_EVENTS):
        writer.write(make_slot(0, generation), rows(generation), "w")
        reader.read(make_slot(0, generation))
    assert cuda.calls.count("open_event") == RING_EVENTS


def test_the_writer_itself_may_read_without_opening_its_own_event(opened, cuda):
    view = opened()
    view.write(make_slot(), rows(1), "w")
    embeddings = view.read(make_slot())
    assert "open_event" not in cuda.calls
    cuda.synchronize(0)
    assert torch.equal(embeddings, rows(1)) and torch.equal(view.read(make_slot(), copy=True), rows(1))


def test_what_a_dead_writer_did_not_settle_is_refused_and_what_it_did_is_read(opened, cuda):
    writer, reader = opened(), opened()
    writer.write(make_slot(0), rows(1), "w-1")
    cuda.synchronize(0)
    writer.write(make_slot(1), rows(2), "w-1")  # settles the first
    die(writer)
    assert torch.equal(reader.read(make_slot(0)), rows(1))
    assert reader.check(make_slot(0))
    for look in (reader.read, reader.check):
        with pytest.raises(StaleSlotError, match="w-1 has died"):
            look(make_slot(1))
    opened().write(make_slot(2), rows(3), "w-2")  # takes over the entry of the dead one
    with pytest.raises(StaleSlotError, match="w-1 has died"):
        reader.read(make_slot(1))
    reader.read(make_slot(2))


def test_a_writer_knows_how_many_of_its_copies_have_not_run(opened, cuda):
    writer, reader = opened(), opened()
    cuda.stream = "encode"
    for number in range(3):
        writer.write(make_slot(number), rows(number), "w")
    assert (reader.settle(), writer.settle()) == (0, 3)
    cuda.run("encode")
    assert writer.settle() == 0


def test_closing_a_view_settles_what_it_wrote(opened, cuda):
    writer, reader = opened(), opened()
    writer.write(make_slot(), rows(1), "w")
    writer.close()
    writer.close()
    assert torch.equal(reader.read(make_slot()), rows(1))
    with pytest.raises(StaleSlotError, match="closed"):
        writer.read(make_slot())


def test_a_writer_that_comes_late_does_not_settle_the_slots_new_write(opened, cuda):
    late, encoder, reader = opened(), opened(), opened()
    cuda.stream = "late"
    late.write(make_slot(generation=1), rows(1), "w-1")
    cuda.stream = "encode"
    encoder.write(make_slot(generation=2), rows(2), "w-2")
    cuda.run("late")
    late.settle()
    cuda.stream = "prefill"
    cuda.calls.clear()
    embeddings = reader.read(make_slot(generation=2))
    cuda.run("prefill")
    assert "wait" in cuda.calls and torch.equal(embeddings, rows(2))


def test_a_closed_pool_refuses_every_slot_and_gives_its_memory_back(pool, opened, cuda, shm):
    view = opened()
    view.write(make_slot(), rows(1), "w")
    pool.close()
    pool.close()
    with pytest.raises(StaleSlotError, match="pool g1 is closed"):
        view.read(make_slot())
    assert cuda.memory == {} and list(shm.iterdir()) == []
    with pytest.raises(PoolError):
        CudaIpcView(pool.descriptor(), runtime=cuda)


def test_no_room_on_the_gpu_leaves_nothing_behind(cuda, shm):
    with pytest.raises(PoolError, match=r"GPU 0: lower cache.pool_bytes .*out of memory"):
        CudaIpcPool("g2", 128 * MIB, runtime=cuda, directory=shm)
    assert list(shm.iterdir()) == []


def test_a_gpu_that_is_not_visible_and_a_table_that_is_gone_are_said(pool, cuda, shm):
    descriptor = pool.descriptor()
    elsewhere = msgspec.structs.replace(decode_location(descriptor.name), device="0000:ff:00.0").encode()
    with pytest.raises(PoolError, match=r"GPU 0000:ff:00\.0 is not visible"):
        CudaIpcView(msgspec.structs.replace(descriptor, name=elsewhere), runtime=cuda)
    with pytest.raises(PoolError, match="not the location"):
        CudaIpcView(msgspec.structs.replace(descriptor, name="/dev/shm/x"), runtime=cuda)
    cuda.memory.clear()
    with pytest.raises(PoolError, match="cannot be opened"):
        CudaIpcView(descriptor, runtime=cuda)
    cuda.memory[1] = None  # for the fixture's close
    (shm / "epd-g1").unlink()
    with pytest.raises(PoolError, match="cannot be opened"):
        CudaIpcView(descriptor, runtime=cuda)


def test_the_table_of_a_living_daemon_is_not_swept(pool, shm):
    assert sweep_stale(shm) == [] and list(shm.iterdir()) == [shm / "epd-g1"]

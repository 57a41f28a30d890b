"""A fake of CUDA for tests of pools in GPU memory: streams that run only when told, and processes that share it."""

import itertools
from collections import defaultdict

import pytest

from cache.pools.cuda_ipc_events import Events
from cache.slot import slot_bytes
from epd.messages import Slot

torch = pytest.importorskip("torch")

MIB = 1 << 20
BUS_ID = "0000:1b:00.0"


class FakeCuda:
    """CUDA in one process: memory is tensors on the CPU, a stream runs its copies when somebody waits for them.

    `stream` is the current one. Each entry of a stream's queue is a function; an event is the queue and how much of it
    there was when it was recorded.
    """

    def __init__(self):
        self.memory = {}
        self.queues = defaultdict(list)
        self.done = defaultdict(int)
        self.events = {}
        self.ids = itertools.count(1)
        self.stream = "main"
        self.calls = []
        self.fail = None
        self.free_bytes = 64 * MIB

    def bus_id(self, device):
        return BUS_ID

    def device_at(self, bus_id):
        if bus_id != BUS_ID:
            raise RuntimeError("cudaErrorInvalidValue")
        return 0

    def allocate(self, device, nbytes):
        if nbytes > self.free_bytes:
            raise RuntimeError("cudaErrorMemoryAllocation: out of memory")
        address = next(self.ids)
        self.memory[address] = torch.full((nbytes,), 0xEE, dtype=torch.uint8)
        return address

    def free(self, device, address):
        del self.memory[address]

    def export_memory(self, device, address):
        return address.to_bytes(64, "little")

    def open_memory(self, device, handle, nbytes):
        try:
            return self.memory[int.from_bytes(handle, "little")][:nbytes]
        except KeyError:
            raise RuntimeError("cudaErrorInvalidResourceHandle") from None

    def create_event(self, device):
        event = next(self.ids)
        self.events[event] = None
        return event

    def export_event(self, event):
        return event.to_bytes(64, "little")

    def open_event(self, device, handle):
        self.calls.append("open_event")
        event = int.from_bytes(handle, "little")
        assert event in self.events
        return event

    def record(self, event, device):
        self.calls.append("record")
        self.events[event] = (self.stream, len(self.queues[self.stream]))

    def wait(self, event, device):
        self.calls.append("wait")
        record = self.events[event]
        if record is not None:
            self.queues[self.stream].append(lambda: self.run(*record))

    def is_done(self, event):
        record = self.events[event]
        return record is None or self.done[record[0]] >= record[1]

    def synchronize(self, device):
        for stream in list(self.queues):
            self.run(stream)

    def device_of(self, tensor):
        return getattr(tensor, "fake_device", 0) if tensor.device.type == "cpu" and not tensor.is_sparse else None

    def copy(self, target, source):
        if self.fail is not None:
            raise RuntimeError(self.fail)
        self.calls.append("copy")
        self.queues[self.stream].append(lambda: target.copy_(source))

    def run(self, stream, until=None):
        """Runs what is in a stream, up to a place in it."""
        queue = self.queues[stream]
        while self.done[stream] < (len(queue) if until is None else until):
            self.done[stream] += 1
            queue[self.done[stream] - 1]()


class Process:
    """The same CUDA as one process sees it, which opens no event that it made itself, and no event twice."""

    def __init__(self, cuda):
        self.cuda = cuda
        self.events = Events()
        self.known = set()

    def __getattr__(self, name):
        return getattr(self.cuda, name)

    def create_event(self, device):
        event = self.cuda.create_event(device)
        self.known.add(event)
        return event

    def open_event(self, device, handle):
        event = self.cuda.open_event(device, handle)
        if event in self.known:
            raise RuntimeError("cudaErrorInvalidResourceHandle")
        self.known.add(event)
        return event


def make_slot(index=0, generation=1, dtype="bfloat16", shape=(3, 40)):
    nbytes = slot_bytes(*shape, dtype)
    return Slot(
        pool_id="g1",
        offset=index * nbytes,
        nbytes=nbytes,
        generation=generation,
        num_tokens=shape[0],
        width=shape[1],
        dtype=dtype,
    )


def rows(value, dtype="bfloat16", shape=(3, 40)):
    return torch.full(shape, value, dtype=getattr(torch, dtype))


def die(view):
    """What the end of a process does to its view: the files are closed, nothing is settled."""
    view._writer = None
    view.close()

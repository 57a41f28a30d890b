"""What an event costs does not grow with peers, queue or cache: counted in calls and lines, not in time.

Each case is measured small and large. What grows with the logarithm (heaps, sorted lists) is in functions written in C,
and counts as one call.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import msgspec
import pytest

from broker.core.core import Core
from broker.core.outbox import Send
from broker.core.wake import Room
from broker.virtual.costs import FREE, Costs
from broker.virtual.endpoint import Flight
from broker.virtual.simulation import ENCODE_INFO, KV_INFO, Item, Pipeline, Shape
from cache.extents import align
from cache.slot import slot_bytes
from epd import messages as m
from epd.config import BrokerConfig
from epd.messages import Message

FACTOR = 1.3
ROWS, NUM_PATCHES = 64, 13
SLOT_BYTES = align(slot_bytes(ROWS, ENCODE_INFO.widths["image"], ENCODE_INFO.dtype))
FEW, MANY = 8, 256  # workers
SHORT, LONG = 3, 2000  # requests that wait behind the head
LITTLE, MUCH = 100, 5000  # entries of the cache
ONE_PATCH_EACH = msgspec.structs.replace(ENCODE_INFO, max_batch_tokens=ROWS)


class CountedCore(Core):
    """The core; while `counts` is set, it counts what its work takes: calls, also of functions written in C, and lines.

    Lines, since a loop need not call anything.
    """

    counts = False
    num_steps = 0

    def handle(self, peer_id: str, message: Message, frames: Sequence[bytes], now: float) -> list[Send]:
        with self._counting():
            return super().handle(peer_id, message, frames, now)

    def tick(self, now: float) -> list[Send]:
        with self._counting():
            return super().tick(now)

    @contextlib.contextmanager
    def _counting(self) -> Iterator[None]:
        if self.counts:
            sys.settrace(self._line)
            sys.setprofile(self._call)
        try:
            yield
        finally:
            sys.setprofile(None)
            sys.settrace(None)

    def _call(self, frame: FrameType, event: str, arg: Any) -> None:
        self.num_steps += event == "c_call"

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        self.num_steps += event in ("call", "line")
        return self._line


class Case:
    """A pipeline of so many workers, half of which encode, a quarter prefills and a quarter decodes."""

    def __init__(self, num_workers: int, pool_slots: int, costs: Costs = FREE, max_num_seqs: int = 256, **config: Any):
        quarter = num_workers // 4
        shape = Shape(
            2 * quarter, quarter, quarter, pool_slots * SLOT_BYTES, encode_info=ONE_PATCH_EACH,
            decode_info=msgspec.structs.replace(KV_INFO, max_num_seqs=max_num_seqs),
        )  # fmt: skip
        config = {"max_in_flight": 100_000, "max_queued": 100_000, "upload_fraction": 1.0} | config
        self.pipeline = Pipeline(shape, BrokerConfig(**config), costs, core=CountedCore)
        self.pipeline.clock.run(1.0)
        self.num_asked = 0

    @property
    def core(self) -> CountedCore:
        core = self.pipeline.broker.core
        assert isinstance(core, CountedCore)
        return core

    def ask(self, num_patches: int = NUM_PATCHES, num_outputs: int = 4) -> Flight:
        number = self.num_asked
        self.num_asked += 1
        hashes = [f"{number}.{k}" for k in range(num_patches)]
        patches = [m.Patch(patch_hash=one, modality="image", num_tokens=ROWS) for one in hashes]
        item = Item(0.0, f"r{number}", 100 + ROWS * num_patches, num_outputs, patches)
        flight = item.flight()
        self.pipeline.endpoint.ask(flight)
        return flight

    def settle(self) -> None:
        self.pipeline.clock.run(0.01)

    def steps(self, peer: Any, message: Message | None, frames: Sequence[bytes] = ()) -> int:
        """How many steps one message takes; or one tick, where there is none."""
        self.core.counts, self.core.num_steps = True, 0
        if message is None:
            self.core.tick(self.pipeline.now)
        else:
            self.core.handle(peer.incarnation, message, frames, self.pipeline.now)
        self.core.counts = False
        return self.core.num_steps


def stands(num_workers: int, num_queued: int, **config: Any) -> Case:
    """Every decode worker has one request, which is all it takes, and is busy for ever: the queue's head is blocked."""
    case = Case(num_workers, 20_000, Costs(decode_step_s=1e6), max_num_seqs=1, **config)
    for _ in case.pipeline.decode:
        case.ask(num_patches=1)
    case.settle()
    case.ask()
    for _ in range(num_queued):
        case.ask()
    case.settle()
    assert len(case.core.queue) == 1 + num_queued
    assert case.core._wake.lacks is Room.DECODE
    assert all(worker.holds() == 1 for worker in case.pipeline.decode)
    for worker in case.pipeline.workers:  # the first that says what work costs changes how all are ranked
        case.steps(worker, m.Heartbeat(num_steps=1, work=m.Work(busy_s=1.0, num_units=100)))
    case.steps(case.pipeline.endpoint, m.Heartbeat())  # the news that has piled up until now
    return case


SIZES = [(FEW, SHORT), (MANY, SHORT), (FEW, LONG), (MANY, LONG)]


def counted(what: str, case: Case) -> int:
    """How many steps one event takes."""
    pipeline, core = case.pipeline, case.core
    worker = pipeline.decode[0]
    leg_id = next(iter(core.registry.workers[worker.incarnation].legs)).leg_id
    if what == "a heartbeat of a worker":
        return case.steps(pipeline.encode[0], m.Heartbeat(num_steps=2, work=m.Work(busy_s=3.0, num_units=200)))
    if what == "a heartbeat of the endpoint":
        return case.steps(pipeline.endpoint, m.Heartbeat())
    if what == "a tick":
        return case.steps(None, None)
    if what == "tokens":
        return case.steps(worker, m.StepOutputs(outputs=[m.LegOutput(leg_id=leg_id, token_ids=[1], num_before=1)]))
    if what == "a submit that is refused":
        return case.steps(pipeline.endpoint, submit(case), [b"engine"])
    if what == "a submit that waits":
        core.config.max_queued = 100_000
        return case.steps(pipeline.endpoint, submit(case), [b"engine"])
    if what == "a cancel of what waits":
        return case.steps(pipeline.endpoint, m.Cancel(request_id=list(core.queue)[-1]))
    if what == "a cancel of what runs, after which the head starts":
        return case.steps(pipeline.endpoint, m.Cancel(request_id=leg_id)) + case.steps(
            worker, m.Released(leg_id=leg_id)
        )
    raise ValueError(what)


def submit(case: Case) -> m.Submit:
    return m.Submit(request_id="new", num_prompt_tokens=100, max_tokens=4, num_engine_frames=1)


@pytest.mark.parametrize(
    "what",
    [
        "a heartbeat of a worker",
        "a heartbeat of the endpoint",
        "a tick",
        "tokens",
        "a submit that is refused",
        "a submit that waits",
        "a cancel of what waits",
        "a cancel of what runs, after which the head starts",
    ],
)
def test_an_event_while_the_head_is_blocked_costs_the_same_whatever_is_there_and_waits(what: str) -> None:
    found = {size: counted(what, stands(*size, max_queued=size[1] + 1)) for size in SIZES}
    assert found[FEW, SHORT] > 0
    assert max(found.values()) <= FACTOR * found[FEW, SHORT], found


def flowing(num_workers: int, num_queued: int, num_entries: int) -> float:
    """Steps for a request, from SUBMIT to its end, in a cache that is full of so many entries.

    Two run at a time; `num_queued` others wait for slots behind them.
    """
    num_requests = 20
    case = Case(num_workers, num_entries)
    running, ended = 2, 0
    if num_queued:  # or else there would be room for more of them
        held = num_entries - running * NUM_PATCHES
        kept = [m.Patch(patch_hash=f"kept {k}", modality="image", num_tokens=ROWS, num_frames=1) for k in range(held)]
        case.pipeline.endpoint.say(m.Upload(upload_id="u", patches=kept, ttl_s=1000.0), [b"pixels"] * held)
        case.settle()
        assert case.core.uploads.num_pins == held

    def end(flight: Flight) -> None:
        nonlocal ended
        assert flight.end == "finished", flight
        ended += 1
        case.ask()

    case.pipeline.endpoint.on_end = end
    for _ in range(running + num_queued):
        case.ask()
    until = num_entries // NUM_PATCHES + 10  # by then it is full
    case.pipeline.clock.run_until(lambda: ended >= until, within_s=0.0)
    assert case.core.patches.index.stats().used_bytes > (num_entries - NUM_PATCHES) * SLOT_BYTES
    case.core.counts = True
    until = ended + num_requests
    case.pipeline.clock.run_until(lambda: ended >= until, within_s=0.0)
    case.core.counts = False
    assert len(case.core.queue) >= num_queued - running
    return case.core.num_steps / num_requests


def test_a_request_costs_the_same_whatever_workers_there_are() -> None:
    found = {num: flowing(num, 0, LITTLE) for num in (FEW, MANY)}
    assert found[MANY] <= FACTOR * found[FEW], found


def test_a_request_costs_the_same_whatever_is_in_the_cache() -> None:
    found = {num: flowing(FEW, 0, num) for num in (LITTLE, MUCH)}
    assert found[MUCH] <= FACTOR * found[LITTLE], found


def test_a_request_costs_the_same_whatever_waits_behind_it() -> None:
    found = {num: flowing(FEW, num, LITTLE) for num in (SHORT, LONG)}
    assert found[LONG] <= FACTOR * found[SHORT], found


def test_the_count_sees_what_grows() -> None:
    """So that it cannot go wrong by counting nothing."""

    class Scanning(CountedCore):
        def _start(self, now: float) -> None:
            for worker in self.registry.workers.values():
                if worker.draining:
                    return
            super()._start(now)

    found = []
    for num_workers in (FEW, MANY):
        case = stands(num_workers, SHORT)
        case.core.__class__ = Scanning
        found.append(counted("tokens", case))
    assert found[1] > 2 * FACTOR * found[0]

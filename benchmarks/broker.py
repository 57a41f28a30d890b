"""What the broker's decision core costs: requests a second and time per event, by workers and by requests that wait.

The core alone, on one core and without sockets or engines: peers in virtual time (`broker.virtual`) answer everything
at once, and only the CPU time inside the core counts. As many requests run at once in all cases, since the cache has
slots for so many; where others wait, their head is blocked until slots are free, and each that ends lets the next one
in. All patches are new and the cache is full of older ones, so each of them takes the place of another.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

from benchmarks.common import Figure
from broker.core.core import Core
from broker.core.outbox import Send
from broker.virtual.endpoint import FINISHED, Flight
from broker.virtual.simulation import ENCODE_INFO, Item, Pipeline, Shape
from cache.extents import align
from cache.slot import slot_bytes
from epd import messages as m
from epd.config import BrokerConfig
from epd.messages import Message

WORKERS = (8, 64, 256, 1000)
QUEUED = (0, 5000)
Case = tuple[int, int]
CASES: list[Case] = [(num_workers, num_queued) for num_queued in QUEUED for num_workers in WORKERS]
NUM_PATCHES, ROWS = 13, 64
NUM_RUNNING = 16
NUM_TOKENS = 4
_NEVER_S = 1e9


class TimedCore(Core):
    """The core, and how long it has taken by now: `busy_s` for `num_events` messages of requests, heartbeats apart."""

    busy_s = beat_s = 0.0
    num_events = num_beats = 0

    def handle(self, peer_id: str, message: Message, frames: Sequence[bytes], now: float) -> list[Send]:
        """As `Core.handle`."""
        began = time.thread_time()
        sends = super().handle(peer_id, message, frames, now)
        took_s = time.thread_time() - began
        if type(message) is m.Heartbeat:
            self.beat_s += took_s
            self.num_beats += 1
        else:
            self.busy_s += took_s
            self.num_events += 1
        return sends

    def forget(self) -> None:
        """What was before was preparation."""
        self.busy_s = self.beat_s = 0.0
        self.num_events = self.num_beats = 0


class Load:
    """A pipeline with so many workers, in which `NUM_RUNNING` requests always run while `num_queued` wait.

    Half of the workers encode, a quarter prefills and the rest decodes.
    """

    def __init__(self, num_workers: int, num_queued: int) -> None:
        nbytes = align(slot_bytes(ROWS, ENCODE_INFO.widths["image"], ENCODE_INFO.dtype))
        encode, prefill = num_workers // 2, num_workers // 4
        shape = Shape(encode, prefill, num_workers - encode - prefill, NUM_RUNNING * NUM_PATCHES * nbytes)
        num_most = num_queued + NUM_RUNNING
        config = BrokerConfig(max_queued=num_most, max_in_flight=2 * num_most, max_queue_s=_NEVER_S)
        self.pipeline = Pipeline(shape, config, core=TimedCore)
        self.pipeline.clock.run(1.0)  # until all have registered
        self._num_asked = self._num_ended = 0
        self.pipeline.endpoint.on_end = self._ended
        for _ in range(num_most):
            self._ask()

    @property
    def core(self) -> TimedCore:
        """The core that is measured."""
        core = self.pipeline.broker.core
        assert isinstance(core, TimedCore)
        return core

    def _ask(self) -> None:
        number = self._num_asked
        self._num_asked += 1
        patches = [m.Patch(patch_hash=f"{number}.{k}", modality="image", num_tokens=ROWS) for k in range(NUM_PATCHES)]
        item = Item(0.0, f"r{number}", 100 + NUM_PATCHES * ROWS, NUM_TOKENS, patches, deadline_s=_NEVER_S)
        self.pipeline.endpoint.ask(item.flight())

    def _ended(self, flight: Flight) -> None:
        assert flight.end == FINISHED, flight
        self._num_ended += 1
        self._ask()

    def run(self, num_requests: int) -> None:
        """Until so many more requests have ended."""
        until = self._num_ended + num_requests
        self.pipeline.clock.run_until(lambda: self._num_ended >= until, within_s=0.0)

    def beat(self) -> None:
        """All workers send a heartbeat, while everything waits."""
        for worker in self.pipeline.workers:
            self.core.handle(worker.incarnation, worker.heartbeat(), [], self.pipeline.now)


def run(rounds: int = 5, num_requests: int = 400) -> tuple[list[Figure], dict[str, float]]:
    """Measures all cases in turn, `rounds` times over; each time with a core that is warm.

    Returns:
        Figures, and what an event and a request cost relative to 8 workers with nothing queued. With few workers, one
        message is about several patches of a request; with many, about one: so there are more of them, which cost less.
    """
    rates: dict[Case, list[float]] = {case: [] for case in CASES}
    events: dict[Case, list[float]] = {case: [] for case in CASES}
    beats: dict[Case, list[float]] = {case: [] for case in CASES}
    for _ in range(rounds):
        for case in CASES:
            load = Load(*case)
            load.run(num_requests // 4)
            load.core.forget()
            load.run(num_requests)
            rates[case].append(num_requests / load.core.busy_s)
            events[case].append(load.core.busy_s / load.core.num_events * 1e6)
            load.beat()
            beats[case].append(load.core.beat_s / load.core.num_beats * 1e6)
    figures: list[Figure] = []
    ratios: dict[str, float] = {}
    for case in CASES:
        name = f"core alone, {case[0]:,} workers, {case[1]:,} queued"
        event = Figure(f"{name}: an event", "µs", events[case])
        figures += [Figure(f"{name}: requests", "1/s", rates[case]), event]
        figures.append(Figure(f"{name}: a heartbeat", "µs", beats[case]))
        least, most = statistics.median(events[CASES[0]]), statistics.median(rates[CASES[0]])
        ratios[f"{name}: an event, to {CASES[0][0]} workers with none"] = event.median / least
        ratios[f"{name}: a request, to the same"] = most / statistics.median(rates[case])
    return figures, ratios

"""The worker daemon beside a real broker, with a stand-in for the engine: drains, hung engines, lost brokers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from broker.core.peers import Peer
from broker.daemon import Broker
from epd.config import BrokerConfig, Config, StageConfig
from epd.messages import Message, Pool, Stage, WorkerInfo
from epd.process.lifecycle import Life
from workers import daemon
from workers.daemon import EngineHungError, Worker
from workers.stage import Frames, StageRunner


class StandIn(StageRunner):
    """A stage without an engine, which works while `busy` is set and stands still where a test has closed a gate."""

    stage = Stage.DECODE
    made: list[StandIn]

    def start(self) -> None:
        self.info = WorkerInfo(kv_capacity_tokens=1000, max_num_seqs=8)
        self.busy = threading.Event()
        self.gates = {name: threading.Event() for name in ("set_pools", "reset", "drain")}
        for gate in self.gates.values():
            gate.set()
        self.reached: set[str] = set()
        self.leaking = ""
        self.made.append(self)

    def stop(self) -> None:
        pass

    def held(self) -> dict[str, int]:
        return {}

    def gauges(self) -> dict[str, float]:
        return {}

    def leak(self, now: float) -> str:
        return self.leaking

    def has_work(self) -> bool:
        return self.busy.is_set()

    def pass_through(self, name: str) -> None:
        self.reached.add(name)
        self.gates[name].wait(30)

    def set_pools(self, pools: list[Pool]) -> None:
        self.pass_through("set_pools")

    def handle(self, message: Message, frames: Frames) -> None:
        pass

    def step(self) -> bool:
        return False

    def poll_s(self, num_idle_steps: int) -> float | None:
        return 0.01

    def drain(self) -> None:
        super().drain()
        self.pass_through("drain")

    def reset(self) -> None:
        self.pass_through("reset")


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    StandIn.made = []
    monkeypatch.setitem(daemon.STAGES, "decode", StandIn)
    hook = threading.excepthook
    yield
    threading.excepthook = hook
    for stage in StandIn.made:
        for gate in stage.gates.values():
            gate.set()


class Side:
    """A broker and a worker."""

    def __init__(self, **changes: float) -> None:
        drain_s = changes.pop("drain_s", 20.0)
        settings = BrokerConfig(address="tcp://127.0.0.1:0", heartbeat_s=0.05, lost_after_s=1.0, **changes)
        self.config = Config(broker=settings, decode=StageConfig(drain_s=drain_s))
        self.stop = asyncio.Event()
        self.tasks: list[asyncio.Task] = []
        self.start_broker()

    def start_broker(self) -> None:
        self.broker = Broker(self.config)
        self.config.broker.address = self.broker.address
        self.serving = asyncio.create_task(self.broker.serve())

    async def stop_broker(self) -> None:
        self.serving.cancel()
        await asyncio.gather(self.serving, return_exceptions=True)
        self.broker.close()

    def start_worker(self) -> asyncio.Task[int]:
        self.worker = Worker(self.config, "decode", "d0")
        task = asyncio.create_task(self.worker.serve(Life(self.stop)))
        self.tasks.append(task)
        return task

    @property
    def peer(self) -> Peer | None:
        return self.broker.core.registry.named("d0")

    async def until(self, condition: Callable[[], object]) -> None:
        """Returns when something is so; pytest's timeout ends it if it never is."""
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


@pytest.fixture
async def sides() -> AsyncIterator[Callable[..., Side]]:
    made: list[Side] = []

    def make(**changes: float) -> Side:
        made.append(Side(**changes))
        return made[-1]

    yield make
    for side in made:
        side.stop.set()
        for stage in StandIn.made:
            stage.busy.clear()
            for gate in stage.gates.values():
                gate.set()
        await asyncio.gather(*side.tasks)
        await side.stop_broker()


async def test_a_worker_that_is_stopped_drains_and_leaves_when_it_has_done_its_work(
    sides: Callable[..., Side],
) -> None:
    side = sides()
    ended = side.start_worker()
    await side.until(lambda: side.peer)
    [stage] = StandIn.made
    stage.busy.set()
    side.worker._thread.call(lambda: None)
    side.stop.set()
    await side.until(lambda: side.peer and side.peer.draining)
    assert not ended.done()
    stage.busy.clear()
    assert await ended == 0
    await side.until(lambda: side.peer is None)


async def test_a_worker_that_does_not_get_done_leaves_when_its_time_to_drain_is_over(
    sides: Callable[..., Side],
) -> None:
    side = sides(drain_s=0.2)
    ended = side.start_worker()
    await side.until(lambda: side.peer)
    [stage] = StandIn.made
    stage.busy.set()
    side.worker._thread.call(lambda: None)
    side.stop.set()
    assert await ended == 0
    await side.until(lambda: side.peer is None)


async def test_a_draining_worker_says_so_to_a_new_broker_too(sides: Callable[..., Side]) -> None:
    side = sides()
    side.start_worker()
    await side.until(lambda: side.peer)
    [stage] = StandIn.made
    stage.busy.set()
    side.worker._thread.call(lambda: None)
    side.stop.set()
    await side.until(lambda: side.peer and side.peer.draining)
    await side.stop_broker()
    side.start_broker()
    await side.until(lambda: side.peer and side.peer.draining)


async def test_a_worker_whose_engine_takes_no_command_says_goodbye_and_ends_with_status_1(
    sides: Callable[..., Side],
) -> None:
    side = sides(hung_after_s=0.5)
    ended = side.start_worker()
    await side.until(lambda: side.peer)
    [stage] = StandIn.made
    stage.gates["drain"].clear()
    side.worker._thread.call(stage.drain)  # and there it stays
    assert await ended == 1
    assert isinstance(side.worker.error, EngineHungError)
    await side.until(lambda: side.peer is None)


async def test_a_worker_does_not_register_again_before_its_engine_has_dropped_everything(
    sides: Callable[..., Side],
) -> None:
    side = sides()
    side.start_worker()
    await side.until(lambda: side.peer)
    [stage] = StandIn.made
    stage.gates["reset"].clear()
    await side.stop_broker()
    side.start_broker()
    await side.until(lambda: "reset" in stage.reached)
    await asyncio.sleep(0.7)  # more than a HELLO's turn
    assert side.peer is None
    stage.gates["reset"].set()
    await side.until(lambda: side.peer)


async def test_a_worker_that_has_lost_too_much_memory_drains_and_ends_with_status_1(sides: Callable[..., Side]) -> None:
    side = sides(hung_after_s=0.5)
    ended = side.start_worker()
    await side.until(lambda: side.peer)
    [stage] = StandIn.made
    stage.busy.set()
    side.worker._thread.call(lambda: None)
    stage.leaking = "30 of 100 KV blocks have belonged to nobody for 60 s"
    await side.until(lambda: side.peer and side.peer.draining)
    assert not ended.done(), "it has something on its hands"
    stage.busy.clear()
    assert await ended == 1
    await side.until(lambda: side.peer is None)

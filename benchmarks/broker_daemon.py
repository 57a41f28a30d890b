"""The broker daemon over real ZeroMQ sockets, with peers in other processes that do nothing but answer at once.

Three processes: the broker, one that speaks for all workers and the cache, and this one, which is the endpoint. What is
measured is what the daemon can do: requests with and without patches, tokens of many legs per engine step, and what it
adds to a message's way. The peers cost more than the broker where everything is small, so besides the rates that were
reached it is said how busy the broker was.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import uvloop
import zmq

from benchmarks.common import Figure
from broker.daemon import Broker
from epd import messages as m
from epd.config import BrokerConfig, Config
from epd.messages import Kind, Message, Stage
from epd.transport import wire
from epd.transport.factory import UNBOUNDED, SocketFactory, address_of

NUM_PATCHES, PATCH_TOKENS, WIDTH = 13, 64, 64
NUM_ENCODE, NUM_PREFILL, NUM_DECODE = 4, 2, 1
NUM_IN_FLIGHT = 128
NUM_LEGS = 256  # of one engine step
STEPS_PER_S = 500.0  # of one decode worker: 128,000 tokens a second
BLOCKS, BLOCK_S = 5, 2.0
_ENGINE_REQUEST = bytes(600)
_STREAM = "s"  # the first letter of requests whose tokens `_streams` sends
# Of those with patches: of pictures as they are, and as if their pixels went another way.
_PATCHES = {"p": bytes(3 * 128 * 128), "h": bytes(64)}
_HEARTBEAT_S = 0.5


def _config(address: str) -> Config:
    """Nobody is taken for lost on a machine that is too slow for the rate: then less is reached, and that is said."""
    return Config(broker=BrokerConfig(address=address, max_in_flight=100_000, max_queued=100_000, lost_after_s=120.0))


# ---- the broker's process --------------------------------------------------------------------------------------------


def _broker(pipe: Connection) -> None:
    """Serves until it is ended; answers each word on `pipe` with the seconds of CPU that it has used."""

    async def main() -> None:
        broker = Broker(_config("tcp://127.0.0.1:0"))
        pipe.send(broker.address)
        loop = asyncio.get_running_loop()
        loop.add_reader(pipe.fileno(), lambda: (pipe.recv(), pipe.send(time.process_time())))
        await broker.serve()

    uvloop.run(main())


# ---- peers -----------------------------------------------------------------------------------------------------------


class Peer:
    """One registered peer on a socket of its own."""

    def __init__(self, sockets: SocketFactory, address: str, name: str, kind: Kind, **hello: Any) -> None:
        self.name = name
        self.sock = sockets.connect_dealer(address, routing_id=name.encode(), max_sent=UNBOUNDED, linger_ms=0)
        self.say(m.Hello(name=name, kind=kind, incarnation=name, host="h", pid=os.getpid(), **hello))
        self._beat_at, self._num_steps = 0.0, 0

    def say(self, message: Message, frames: Any = ()) -> None:
        """Sends to the broker."""
        self.sock.send_multipart(wire.encode(message, frames), copy=False)

    def beat(self, now: float) -> None:
        """A heartbeat, if it is time."""
        if now >= self._beat_at:
            self._beat_at = now + _HEARTBEAT_S
            self._num_steps += 1  # an engine that makes none is taken for hung
            self.say(m.Heartbeat(num_steps=self._num_steps))

    def messages(self) -> Iterator[tuple[Message, list[bytes]]]:
        """What has come."""
        while True:
            try:
                parts = self.sock.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            yield wire.decode(parts)


def _infos() -> Iterator[tuple[str, Stage, m.WorkerInfo]]:
    room = {"kv_capacity_tokens": 1 << 30, "max_num_seqs": 4096}
    for number in range(NUM_ENCODE):
        yield f"e{number}", Stage.ENCODE, m.WorkerInfo(widths={"image": WIDTH}, dtype="float16", max_batch_tokens=8192)
    for number in range(NUM_PREFILL):
        kv = m.KvPeer(engine_id=f"p{number}", host="h", port=1)
        yield f"p{number}", Stage.PREFILL, m.WorkerInfo(kv=kv, **room)
    for number in range(NUM_DECODE):
        yield f"d{number}", Stage.DECODE, m.WorkerInfo(**room)


class Workers:
    """All workers: each answers at once, and decode ends an answer with its second token."""

    def __init__(self, sockets: SocketFactory, address: str) -> None:
        pool = m.Pool(pool_id="pool", kind="none", name="pool", nbytes=1 << 30, host="h")
        self._cache = Peer(sockets, address, "cache", Kind.CACHE, pools=[pool])
        self._workers = {
            name: Peer(sockets, address, name, Kind.WORKER, stage=stage, info=info) for name, stage, info in _infos()
        }
        self.decode = self._workers["d0"]
        self._missing: dict[str, int] = {}

    def peers(self) -> list[Peer]:
        """All of them."""
        return [self._cache, *self._workers.values()]

    def answer(self, peer: Peer) -> None:
        """Takes in what has come for a worker, and answers."""
        steps: list[m.LegOutput] = []
        for message, _ in peer.messages():
            match message:
                case m.Encode():
                    jobs = [m.EncodedJob(job_id=job.job_id, generation=job.slot.generation) for job in message.jobs]
                    peer.say(m.Encoded(jobs=jobs, took_s=0.001))
                case m.Prefill():
                    missing = self._missing.pop(message.leg_id, 0) + self._wanted(message.leg_id) - len(message.ready)
                    self._prefill(peer, message.leg_id, missing)
                case m.Ready():
                    self._prefill(peer, message.leg_id, self._missing.pop(message.leg_id) - len(message.ready))
                case m.Prefilled() if not message.leg_id.startswith(_STREAM):
                    steps.append(m.LegOutput(leg_id=message.leg_id, token_ids=[2], num_before=1, finish_reason="stop"))
        if steps:
            peer.say(m.StepOutputs(outputs=steps))

    @staticmethod
    def _wanted(leg_id: str) -> int:
        return NUM_PATCHES if leg_id[0] in _PATCHES else 0

    def _prefill(self, peer: Peer, leg_id: str, missing: int) -> None:
        if missing:
            self._missing[leg_id] = missing
            return
        peer.say(m.Prefilled(leg_id=leg_id, token_ids=[1]))
        peer.say(m.Pushed(leg_id=leg_id))


def _workers(address: str, endpoint: str, pipe: Connection) -> None:
    """Speaks for all workers, until it is ended; `endpoint` is where the endpoint can be reached without the broker."""
    with SocketFactory() as sockets:
        workers = Workers(sockets, address)
        direct = Peer(sockets, endpoint, "direct", Kind.WORKER)
        poller = zmq.Poller()
        by_socket = {peer.sock: peer for peer in workers.peers()}
        for sock in by_socket:
            poller.register(sock, zmq.POLLIN)
        pipe.send("ready")
        while True:
            if pipe.poll():
                is_direct, *what = pipe.recv()
                pipe.send(_streams(workers, direct if is_direct else None, *what))
            now = time.monotonic()
            for peer in by_socket.values():
                peer.beat(now)
            for sock, _ in poller.poll(100):
                workers.answer(by_socket[sock])


def _streams(workers: Workers, direct: Peer | None, num_legs: int, rate: float, seconds: float) -> int:
    """Decode worker d0 says what engine steps gave `num_legs` legs, so many steps a second; returns how many it said.

    It says so to the broker, or to `direct`, which is the endpoint. The first token of each step is the time, of a
    clock that all processes share, in two halves.
    """
    teller = direct or workers.decode
    rest = [m.LegOutput(leg_id=f"{_STREAM}{number}", token_ids=[7, 7]) for number in range(1, num_legs)]
    began = time.monotonic()
    num_steps = 0
    while (now := time.monotonic()) < began + seconds:
        due = began + num_steps / rate
        if now < due:
            time.sleep(due - now)
        teller.say(_step(rest))
        num_steps += 1
        for peer in workers.peers():
            peer.beat(now)
    return num_steps


def _step(rest: list[m.LegOutput]) -> m.StepOutputs:
    stamp = time.monotonic_ns()
    first = m.LegOutput(leg_id=f"{_STREAM}0", token_ids=[stamp >> 32, stamp & 0xFFFFFFFF])
    return m.StepOutputs(outputs=[first, *rest])


# ---- the endpoint ----------------------------------------------------------------------------------------------------


class Endpoint:
    """Submits requests and counts what comes back."""

    def __init__(self, sockets: SocketFactory, address: str) -> None:
        self.peer = Peer(sockets, address, "ep", Kind.ENDPOINT)
        self._direct = sockets.bind_router("tcp://127.0.0.1:*", max_waiting=UNBOUNDED)
        self.address = address_of(self._direct)
        self.num_stages = 0
        self._number = 0

    def submit(self, kind: str, number: int | None = None, max_tokens: int = 16) -> None:
        """Sends a request of a kind, by its first letter."""
        self._number += 1
        name = f"{kind}{self._number if number is None else number}"
        patches = [
            m.Patch(patch_hash=f"{name}-{k}", modality="image", num_tokens=PATCH_TOKENS, num_frames=1)
            for k in range(NUM_PATCHES if kind in _PATCHES else 0)
        ]
        submit = m.Submit(
            request_id=name, num_prompt_tokens=1000, max_tokens=max_tokens, num_engine_frames=1, patches=patches,
            resumable=True, prefill_samples=True,
        )  # fmt: skip
        self.peer.say(submit, [_ENGINE_REQUEST, *[_PATCHES.get(kind, b"")] * len(patches)])

    def outputs(self, timeout_s: float = 1.0) -> Iterator[m.RequestOutput]:
        """What has come for requests, waiting for a while for the first message."""
        self.peer.beat(time.monotonic())
        self.peer.sock.poll(int(timeout_s * 1000))
        for message, _ in self.peer.messages():
            if isinstance(message, m.Outputs):
                yield from message.outputs
            elif isinstance(message, m.Status):
                self.num_stages = len({worker.stage for worker in message.workers} or range(self.num_stages))
            elif isinstance(message, m.Failed):
                raise RuntimeError(f"{message.request_id}: {message.code}: {message.message}")

    def direct_outputs(self, timeout_s: float = 1.0) -> Iterator[m.LegOutput]:
        """What has come from a worker without the broker."""
        self.peer.beat(time.monotonic())
        if self._direct.poll(int(timeout_s * 1000)):
            _, *parts = self._direct.recv_multipart()
            message, _ = wire.decode(parts)
            yield from getattr(message, "outputs", ())

    def wait_ready(self) -> None:
        """Returns when there are workers of all stages."""
        until = time.monotonic() + 30
        while self.num_stages < len(Stage):
            assert time.monotonic() < until, "the workers did not register"
            for _ in self.outputs(0.1):
                pass


class Bench:
    """All three processes."""

    def __init__(self, endpoint: Endpoint, broker: Connection, workers: Connection) -> None:
        self._endpoint, self._broker, self._workers = endpoint, broker, workers

    def broker_cpu_s(self) -> float:
        """Seconds of CPU that the broker has used."""
        self._broker.send("cpu")
        used: float = self._broker.recv()
        return used

    def requests(self, kind: str, seconds: float) -> tuple[float, float]:
        """Keeps `NUM_IN_FLIGHT` requests in flight; returns requests a second, and a second of the broker's CPU."""
        endpoint, num_done, num_open = self._endpoint, 0, 0
        cpu_s, began = self.broker_cpu_s(), time.monotonic()
        while (now := time.monotonic()) < began + seconds:
            while num_open < NUM_IN_FLIGHT:
                endpoint.submit(kind)
                num_open += 1
            done = sum(bool(output.finish_reason) for output in endpoint.outputs())
            num_open, num_done = num_open - done, num_done + done
        took_s, used_s = now - began, self.broker_cpu_s() - cpu_s
        while num_open:
            num_open -= sum(bool(output.finish_reason) for output in endpoint.outputs())
        return num_done / took_s, num_done / used_s

    def begin_streams(self) -> None:
        """Has `NUM_LEGS` requests decode that do not end."""
        num_begun = 0
        for number in range(NUM_LEGS):
            self._endpoint.submit(_STREAM, number, max_tokens=1 << 20)
        while num_begun < NUM_LEGS:
            num_begun += sum(1 for _ in self._endpoint.outputs())

    def streams(
        self, num_legs: int, rate: float, seconds: float, *, is_direct: bool = False
    ) -> tuple[float, float, list[float]]:
        """So many engine steps a second of `num_legs` legs for a while; `is_direct`: without the broker.

        Returns token updates a second, and a second of the broker's CPU, and the microseconds from a worker's send to
        the endpoint, of each step.
        """
        endpoint, num_updates, delays_us = self._endpoint, 0, list[float]()
        cpu_s, began = self.broker_cpu_s(), time.monotonic()
        self._workers.send((is_direct, num_legs, rate, seconds))
        outputs = endpoint.direct_outputs if is_direct else endpoint.outputs
        num_steps: int | None = None
        while num_steps is None or num_updates < num_steps * num_legs:
            assert time.monotonic() < began + seconds + 60, "token updates are missing"
            for output in outputs(0.05):
                num_updates += 1
                if (output.leg_id if is_direct else output.request_id) == f"{_STREAM}0":
                    sent_ns = (output.token_ids[0] << 32) + output.token_ids[1]
                    delays_us.append((time.monotonic_ns() - sent_ns) / 1e3)
            if num_steps is None and self._workers.poll():
                num_steps = self._workers.recv()
        took_s, used_s = time.monotonic() - began, self.broker_cpu_s() - cpu_s
        return num_updates / took_s, num_updates / used_s, delays_us


@contextlib.contextmanager
def _bench() -> Iterator[Bench]:
    spawn = multiprocessing.get_context("spawn")
    broker, broker_end = spawn.Pipe()
    workers, workers_end = spawn.Pipe()
    processes = [spawn.Process(target=_broker, args=(broker_end,), daemon=True)]
    processes[0].start()
    try:
        with SocketFactory() as sockets:
            address = broker.recv()
            endpoint = Endpoint(sockets, address)
            processes.append(spawn.Process(target=_workers, args=(address, endpoint.address, workers_end), daemon=True))
            processes[1].start()
            workers.recv()
            endpoint.wait_ready()
            yield Bench(endpoint, broker, workers)
    finally:
        for process in processes:
            process.terminate()
            process.join(5)


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


def run() -> list[Figure]:
    """All figures, each of several blocks."""
    figures: dict[str, Figure] = {}

    def note(name: str, unit: str, value: float) -> None:
        figures.setdefault(name, Figure(name, unit, [])).values.append(value)

    with _bench() as bench:
        kinds = {"t": "requests without patches"} | {
            kind: f"requests of {NUM_PATCHES} patches of {len(pixels)} bytes" for kind, pixels in _PATCHES.items()
        }
        for kind in kinds:
            bench.requests(kind, 1.0)  # warm
        for _ in range(BLOCKS):
            for kind, name in kinds.items():
                reached, possible = bench.requests(kind, BLOCK_S)
                note(f"broker daemon, {name}", "1/s", reached)
                note(f"broker daemon, {name}, a second of its CPU", "1/s", possible)
        bench.begin_streams()
        for _ in range(BLOCKS):
            reached, possible, _ = bench.streams(NUM_LEGS, STEPS_PER_S, BLOCK_S)
            note(f"broker daemon, token updates, {NUM_LEGS} a step", "1/s", reached)
            note(f"broker daemon, token updates, {NUM_LEGS} a step, a second of its CPU", "1/s", possible)
        for _ in range(BLOCKS):
            for num_legs in (1, 16, NUM_LEGS):
                ways = [bench.streams(num_legs, 100.0, BLOCK_S, is_direct=is_direct)[2] for is_direct in (True, False)]
                for share, name in ((0.5, "p50"), (0.99, "p99")):
                    direct_us, broker_us = (_percentile(delays_us, share) for delays_us in ways)
                    note(
                        f"added to a step of {num_legs} legs on its way to the endpoint, {name}",
                        "us",
                        broker_us - direct_us,
                    )
    return list(figures.values())

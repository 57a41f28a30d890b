"""A workload run through a pipeline in virtual time: the real decision core, and peers that take as long as costs say.

Pure. The same pipeline, costs and workload give the same messages, byte for byte.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial

import msgspec

from broker.core.core import Core
from broker.virtual.costs import FREE, CostModel
from broker.virtual.decode import DecodeWorker
from broker.virtual.encode import EncodeWorker
from broker.virtual.endpoint import FINISHED, Endpoint, Flight
from broker.virtual.link import Cache
from broker.virtual.network import Network
from broker.virtual.prefill import PrefillWorker
from broker.virtual.workers import EngineRequest, StageWorker
from epd.config import BrokerConfig
from epd.messages import Counters, Patch, Submit, WorkerInfo

ENCODE_INFO = WorkerInfo(
    model="virtual", widths={"image": 64, "video": 64, "audio": 64}, dtype="bfloat16", max_batch_tokens=1024
)  # fmt: skip
KV_INFO = WorkerInfo(model="virtual", kv_capacity_tokens=1 << 17, max_num_seqs=256)
_SETTLE_S = 1.0  # until all have registered


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """How many peers a pipeline has, and how large they are.

    `encode`, `prefill` and `decode` count workers, `*_info` says what they say of themselves; `hosts` are given to
    the workers of each stage in turn, and there is a cache with `pool_bytes` on each of them.
    """

    encode: int = 1
    prefill: int = 1
    decode: int = 1
    pool_bytes: int = 64 << 20
    encode_info: WorkerInfo = ENCODE_INFO
    prefill_info: WorkerInfo = KV_INFO
    decode_info: WorkerInfo = KV_INFO
    hosts: Sequence[str] = ("h",)
    max_batched_tokens: int = 8192
    min_overlap_tokens: int = 512


@dataclasses.dataclass(frozen=True, slots=True)
class Item:
    """A request of a workload: it comes `at_s`, and its answer gets `num_outputs` tokens long.

    `patches` are those of its media, in the order of the prompt, and `starts` where they are in it (`EngineRequest`).
    """

    at_s: float
    request_id: str
    num_prompt_tokens: int
    num_outputs: int
    patches: Sequence[Patch] = ()
    starts: Sequence[int] = ()
    max_tokens: int = 0
    deadline_s: float = 600.0
    tenant: str = ""
    prefill_samples: bool = True
    resumable: bool = True

    def flight(self) -> Flight:
        """As its endpoint has it."""
        patches = [msgspec.structs.replace(patch, num_frames=1) for patch in self.patches]
        submit = Submit(
            request_id=self.request_id, num_prompt_tokens=self.num_prompt_tokens,
            max_tokens=self.max_tokens or self.num_outputs, num_engine_frames=1, patches=patches,
            deadline_s=self.deadline_s, tenant=self.tenant, resumable=self.resumable,
            prefill_samples=self.prefill_samples,
        )  # fmt: skip
        hashes = [patch.patch_hash for patch in patches]
        engine = EngineRequest(self.num_prompt_tokens, self.num_outputs, hashes, list(self.starts))
        return Flight(submit, [msgspec.msgpack.encode(engine), *([b"pixels"] * len(patches))])


@dataclasses.dataclass(frozen=True, slots=True)
class Timing:
    """What became of a request: seconds from when it came to its first and to its last token (NaN: none)."""

    request_id: str
    end: str
    num_tokens: int
    ttft_s: float
    e2e_s: float

    @property
    def tpot_s(self) -> float:
        """Seconds a token after the first; 0 if there is only one."""
        return (self.e2e_s - self.ttft_s) / (self.num_tokens - 1) if self.num_tokens > 1 else 0.0


class Pipeline(Network):
    """A broker, an endpoint, caches and workers, all registered.

    Args:
        shape: how many there are.
        config: of the broker.
        costs: what their steps take.
        latency_s: of each message.
        core: makes the broker's core.
    """

    def __init__(
        self,
        shape: Shape,
        config: BrokerConfig | None = None,
        costs: CostModel = FREE,
        latency_s: float = 0.0,
        core: type[Core] = Core,
    ) -> None:
        super().__init__(config or BrokerConfig(), latency_s, core)
        hosts = shape.hosts
        self.endpoint = Endpoint(self, "endpoint", hosts[0])
        self.caches = [Cache(self, f"cache-{i}", shape.pool_bytes, host) for i, host in enumerate(hosts)]
        self.encode = [
            EncodeWorker(self, f"encode-{i}", shape.encode_info, costs, hosts[i % len(hosts)])
            for i in range(shape.encode)
        ]
        self.prefill = [
            PrefillWorker(
                self, f"prefill-{i}", shape.prefill_info, costs, hosts[i % len(hosts)],
                max_batched_tokens=shape.max_batched_tokens, min_overlap_tokens=shape.min_overlap_tokens,
            )
            for i in range(shape.prefill)
        ]  # fmt: skip
        self.decode = [
            DecodeWorker(self, f"decode-{i}", shape.decode_info, costs, hosts[i % len(hosts)])
            for i in range(shape.decode)
        ]
        for process in (self.broker, *self.caches, *self.workers, self.endpoint):
            process.start()

    @property
    def workers(self) -> list[StageWorker]:
        """All of them."""
        return [*self.encode, *self.prefill, *self.decode]

    def held(self) -> dict[str, int]:
        """What any process holds for requests; empty when everything is idle."""
        counters = self.broker.core.counters()
        found = {name: getattr(counters, name) for name in counters.__struct_fields__ if name.startswith("held_")}
        found |= {worker.name: worker.holds() for worker in self.workers if worker.alive}
        return {name: count for name, count in found.items() if count}


@dataclasses.dataclass(slots=True)
class Outcome:
    """The result of a workload: each request's times, in the order in which they ended, and the broker's counters.

    `num_events` counts what happened in virtual time, `took_s` how long that was from the first request on.
    """

    timings: list[Timing]
    counters: Counters
    num_events: int
    took_s: float

    @property
    def ends(self) -> Counter[str]:
        """How many requests ended in which way."""
        return Counter(timing.end for timing in self.timings)

    @property
    def num_finished(self) -> int:
        """How many have their whole answer."""
        return self.ends[FINISHED]


def simulate(pipeline: Pipeline, workload: Iterable[Item], within_s: float = 1e9) -> Outcome:
    """Runs a workload to its end.

    Args:
        pipeline: a new one; it is used up.
        workload: in the order of time; it is read as time passes, so it may be long.
        within_s: the limit in virtual time; requests that have not ended by then have no timing.
    """
    clock, timings = pipeline.clock, []
    items = iter(workload)
    pipeline.clock.run(_SETTLE_S)
    began_at = clock.now
    is_over = False

    def end(flight: Flight) -> None:
        first_s, last_s = flight.first_at - flight.asked_at, flight.ended_at - flight.asked_at
        timings.append(Timing(flight.request_id, flight.end, len(flight.tokens), first_s, last_s))

    def arrive(item: Item) -> None:
        pipeline.endpoint.ask(item.flight())
        come()

    def come() -> None:
        nonlocal is_over
        item = next(items, None)
        if item is None:
            is_over = True
        else:
            clock.after(began_at + item.at_s - clock.now, partial(arrive, item))

    pipeline.endpoint.on_end = end
    come()
    clock.run_until(lambda: is_over and not pipeline.endpoint.flights, within_s)
    return Outcome(timings, pipeline.broker.core.counters(), clock.num_events, clock.now - began_at)

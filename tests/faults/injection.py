"""The faults of the table, as things that happen to a cluster's transport, memory or processes."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

from broker.virtual.process import Process
from cache.slot import HEADER_BYTES, MAGIC, slot_bytes
from epd.messages import Stage
from tests.faults.cluster import Cluster
from tests.faults.engines import DTYPE, WIDTH, Ask, EngineRequest
from tests.faults.processes import BROKER, LAST, Fault, Packet, WorkerProcess

HANG_S, SLOW_S = 6.0, 0.5
SLOT_BYTES = slot_bytes(4, WIDTH, DTYPE)
_GENERATION_AT = 16
DEADLINE_S = 15.0
# The packets of each edge: (source, target) -> kinds. Heartbeats and registration belong to every edge of the broker.
EDGES: dict[str, dict[tuple[str, str], tuple[str, ...]]] = {
    "endpoint–broker": {("endpoint", BROKER): ("Submit", "Cancel")},
    "broker–encode": {(BROKER, "encode"): ("Encode", "DropEncode"), ("encode", BROKER): ("Encoded",)},
    "broker–prefill": {
        (BROKER, "prefill"): ("Prefill", "Ready", "Abort"),
        ("prefill", BROKER): ("Prefilled", "Pushed", "Released"),
    },
    "prefill–decode": {("prefill", "decode"): ("kv",), ("decode", "prefill"): ("register", "call off")},
    "broker–decode": {
        (BROKER, "decode"): ("Decode", "Prefilled", "Abort"),
        ("decode", BROKER): ("StepOutputs", LAST + "StepOutputs", "Released"),
    },
    "broker–endpoint": {(BROKER, "endpoint"): ("Outputs", LAST + "Outputs")},
}
MEMORY_EDGES = ("encode–cache", "cache–prefill")
# Who is killed, or hangs, for an edge.
VICTIMS = {
    "endpoint–broker": "broker",
    "broker–encode": "encode",
    "encode–cache": "cache",
    "cache–prefill": "cache",
    "broker–prefill": "prefill",
    "prefill–decode": "prefill",
    "broker–decode": "decode",
    "broker–endpoint": "endpoint",
}

Variant = tuple[str, Callable[[Cluster], None]]


def requests(cluster: Cluster) -> list[Ask]:
    """Six requests with 0 to 2 patches, of which two are the same; one cannot be continued, one is cancelled."""
    asks = []
    for i in range(6):
        pixels = {f"hash {i % 5} {k}": f"pixels {i % 5} {k}".encode() for k in range(i % 3)}
        request = EngineRequest(prompt=b"prompt %d " % i * 4, max_tokens=12, patches=list(pixels))
        asks.append(Ask(f"r{i}", request, pixels, i != 4, i not in (1, 4), DEADLINE_S))
    return asks


def variants(edge: str, fault: str) -> Iterator[Variant]:
    """All the ways in which a cell's fault is tried, by name."""
    if fault in ("killed", "hung"):
        for at_ms in (0, 4, 7, 10, 14, 20, 30, 45):
            yield f"{VICTIMS[edge]} at {at_ms} ms", _process_fault(VICTIMS[edge], fault, at_ms / 1000)
    elif edge in MEMORY_EDGES:
        for number in range(4):
            yield f"at step {number}", _memory_fault(edge, fault, number)
    elif fault == "slow":
        yield f"{SLOW_S} s each", lambda cluster: cluster.faults.append(slow(edge))
    elif fault == "stale":
        yield "all again from and to the earlier life", lambda cluster: replay(cluster, edge)
    else:
        make = {"lost": lose, "duplicated": duplicate, "reordered": reorder, "corrupted": corrupt}[fault]
        for (source, target), kinds in EDGES[edge].items():
            for kind, number in itertools.product(kinds, range(3)):
                name = f"{kind} number {number} from {source} to {target}"
                yield name, _packet_fault(make, source, target, kind, number)


# ---- packets ---------------------------------------------------------------------------------------------------------


def _packet_fault(make: Callable[..., Fault], source: str, target: str, kind: str, number: int) -> Callable:
    def begin(cluster: Cluster) -> None:
        count = itertools.count()

        def hit(packet: Packet) -> bool:
            mine = (packet.source, packet.target, packet.kind) == (source, target, kind)
            return mine and next(count) == number

        cluster.faults.append(make(hit))

    return begin


def lose(hit: Callable[[Packet], bool]) -> Fault:
    """The packet never arrives."""
    return lambda packet: [] if hit(packet) else [(0.0, packet.parts)]


def duplicate(hit: Callable[[Packet], bool]) -> Fault:
    """It arrives twice, the second time a little later."""
    return lambda packet: [(0.0, packet.parts), (0.02, packet.parts)] if hit(packet) else [(0.0, packet.parts)]


def reorder(hit: Callable[[Packet], bool]) -> Fault:
    """It arrives after others that were sent after it."""
    return lambda packet: [(0.02, packet.parts)] if hit(packet) else [(0.0, packet.parts)]


def corrupt(hit: Callable[[Packet], bool]) -> Fault:
    """Bytes of its frame's beginning are others: it is no message any more."""

    def fault(packet: Packet) -> list[tuple[float, list[bytes]]]:
        if not hit(packet):
            return [(0.0, packet.parts)]
        first, *rest = packet.parts
        return [(0.0, [bytes(byte ^ 0x55 for byte in first), *rest])]

    return fault


def slow(edge: str) -> Fault:
    """Everything on the edge takes long."""
    ways = EDGES[edge]

    def fault(packet: Packet) -> list[tuple[float, list[bytes]]]:
        mine = packet.kind in ways.get((packet.source, packet.target), ())
        return [(SLOW_S if mine else 0.0, packet.parts)]

    return fault


def replay(cluster: Cluster, edge: str) -> None:
    """The victim is killed, and when it is back, all that was ever said on the edge arrives once more."""
    victim = process(cluster, VICTIMS[edge])
    cluster.clock.after(0.02, victim.kill)

    def again() -> None:
        for packet, incarnation in list(cluster.seen):
            if packet.kind in EDGES[edge].get((packet.source, packet.target), ()):
                cluster.deliver(packet.target, incarnation, packet.parts, 0.001)

    cluster.clock.after(0.02 + 3.0, again)


# ---- processes -------------------------------------------------------------------------------------------------------


def process(cluster: Cluster, name: str) -> Process:
    """The process of a name; of several workers, the one that has most to do."""
    named = {"broker": cluster.broker, "endpoint": cluster.endpoint, "cache": cluster.cache}
    return named[name] if name in named else cluster.worker(Stage(name))


def _process_fault(name: str, fault: str, at_s: float) -> Callable[[Cluster], None]:
    def begin(cluster: Cluster) -> None:
        def strike() -> None:
            victim = process(cluster, name)
            if fault == "killed":
                victim.kill()
            else:
                victim.hang(HANG_S)

        cluster.clock.after(at_s, strike)

    return begin


# ---- memory ----------------------------------------------------------------------------------------------------------


def _memory_fault(edge: str, fault: str, number: int) -> Callable[[Cluster], None]:
    """What can become of the slots right after the step that writes them, or right before the one that reads them.

    "lost": nothing was written. "duplicated": a late writer puts there once more what was there. "reordered": the news
    of a slot overtakes its data. "stale": the slot has another generation. "corrupted": a bit is another. "slow": the
    step takes long.
    """
    role = Stage.ENCODE if edge == "encode–cache" else Stage.PREFILL

    def begin(cluster: Cluster) -> None:
        count = itertools.count()

        def before_step(worker: WorkerProcess) -> None:
            if worker.role is not role or next(count) != number:
                return
            memory = cluster.pools[cluster.cache.pool_id]
            if fault == "slow":
                worker.hang(SLOW_S)
            elif role is Stage.ENCODE:
                cluster.clock.after(0.0, lambda: damage(cluster, memory, fault, number))
            else:
                damage(cluster, memory, fault, number)

        cluster.before_step = before_step

    return begin


def damage(cluster: Cluster, memory: bytearray, fault: str, number: int) -> None:
    """Changes every slot of a pool."""
    before, slots = bytes(memory), []
    at = memory.find(MAGIC)
    while at >= 0:
        slots.append(at)
        at = memory.find(MAGIC, at + 1)

    def put_back(there: bytes) -> None:
        for at in slots:
            if memory[at : at + len(MAGIC)] == there[at : at + len(MAGIC)] or fault == "duplicated":
                memory[at : at + SLOT_BYTES] = before[at : at + SLOT_BYTES]

    for at in slots:
        match fault:
            case "lost" | "reordered":
                memory[at : at + len(MAGIC)] = bytes(len(MAGIC))
            case "stale":
                memory[at + _GENERATION_AT] ^= 1
            case "corrupted":
                memory[at + HEADER_BYTES + random.Random(number).randrange(64)] ^= 1 << number
    damaged = bytes(memory)
    if fault in ("reordered", "duplicated"):
        cluster.clock.after(0.02, lambda: put_back(damaged))

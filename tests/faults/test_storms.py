"""Many faults at once, by seed: whatever happens, no answer is wrong, each request ends, and nothing stays held."""

from __future__ import annotations

import random
from typing import Any

import pytest

from broker.virtual.process import Process
from tests.faults.cluster import Cluster
from tests.faults.engines import Ask, EngineRequest
from tests.faults.processes import Packet

SECONDS, NUM_REQUESTS, NUM_FAULTS = 12.0, 30, 6
SETTLED_WITHIN_S = 150.0


def begin(seed: int, *, lossy: bool) -> tuple[Cluster, list[Ask], list[str]]:
    """A cluster with a storm before it; `lossy` adds what no socket does: messages lost, repeated, late or broken."""
    rng = random.Random(f"storm {seed}")
    cluster, asks, told = Cluster(), [], []
    for i in range(NUM_REQUESTS):
        at_s = rng.uniform(0, SECONDS)
        pixels = {f"hash {(k := rng.randrange(12))}": f"pixels {k}".encode() for _ in range(rng.randrange(4))}
        request = EngineRequest(
            prompt=b"p %d " % i * rng.randint(1, 8), max_tokens=rng.randint(1, 40), patches=[*pixels]
        )
        resumable, prefill_samples = rng.choice([(True, True), (True, False), (False, False)])
        asks.append(Ask(f"r{i}", request, pixels, resumable, prefill_samples, 40.0))
        cluster.ask(asks[-1], at_s)
        if rng.random() < 0.15:
            cancel_at_s = at_s + rng.uniform(0, 0.3)
            cluster.clock.after(cancel_at_s, lambda ask=asks[-1]: cluster.endpoint.cancel(ask))  # type: ignore[misc]
    processes: list[Process] = [cluster.broker, cluster.cache, *cluster.workers]
    for _ in range(NUM_FAULTS):
        at_s, victim = rng.uniform(0, SECONDS), rng.choice(processes)
        if rng.random() < 0.6:
            told.append(f"{at_s:.3f} kill {victim.name}")
            cluster.clock.after(at_s, lambda victim=victim: victim.alive and victim.kill())  # type: ignore[misc]
        else:
            for_s = rng.choice((0.3, 2.0, 6.0))
            told.append(f"{at_s:.3f} hang {victim.name} {for_s} s")
            cluster.clock.after(at_s, lambda victim=victim, for_s=for_s: victim.alive and victim.hang(for_s))  # type: ignore[misc]
    if lossy:
        cluster.faults.append(lambda packet: _lossy(rng, packet))
    return cluster, asks, told


def _lossy(rng: random.Random, packet: Packet) -> list[tuple[float, list[bytes]]]:
    if packet.kind in ("Hello", "Welcome", "Heartbeat", "HeartbeatAck", "Status", "Pools", "call off", "refused"):
        return [(0.0, packet.parts)]
    made: Any = {
        0: [],
        1: [(0.0, packet.parts), (rng.uniform(0, 0.05), packet.parts)],
        2: [(rng.uniform(0, 0.05), packet.parts)],
        3: [(0.0, [bytes(byte ^ 0x55 for byte in packet.parts[0]), *packet.parts[1:]])],
    }
    return made.get(rng.randrange(400), [(0.0, packet.parts)])


def check(cluster: Cluster, asks: list[Ask], told: list[str]) -> None:
    settled = cluster.settle(SETTLED_WITHIN_S)
    for ask in asks:
        truth = ask.truth()
        assert ask.tokens == truth[: len(ask.tokens)], (ask.request_id, "is wrong", told)
        assert ask.end != "finished" or ask.tokens == truth, (ask.request_id, "is not whole", told)
        assert ask.end, (ask.request_id, "has no end", told)
    assert settled, ("still held", cluster.held(), told)


@pytest.mark.parametrize("seed", range(25))
def test_a_storm_of_dying_and_hanging_daemons(seed: int) -> None:
    cluster, asks, told = begin(seed, lossy=False)
    check(cluster, asks, told)
    wanted = [ask for ask in asks if ask.end != "cancelled"]
    assert all(ask.end in ("finished", "worker_lost", "broker_lost", "overloaded", "preempted") for ask in wanted), (
        [(ask.request_id, ask.end) for ask in wanted if ask.end != "finished"],
        told,
    )


@pytest.mark.parametrize("seed", range(100, 115))
def test_a_storm_over_a_transport_that_loses_repeats_and_breaks_messages(seed: int) -> None:
    check(*begin(seed, lossy=True))

"""Pipelines in virtual time: they take as long as their costs say, survive what real ones do, and repeat exactly."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from broker.virtual.costs import Costs
from broker.virtual.simulation import ENCODE_INFO, KV_INFO, Item, Pipeline, Shape, simulate
from epd import messages as m
from epd.config import BrokerConfig
from epd.transport import wire

ROOT = Path(__file__).resolve().parent.parent.parent
COSTS = Costs(
    encode_step_s=0.01, encode_patch_s=0.05, prefill_step_s=0.02, prefill_token_s=0.0001, decode_step_s=0.01,
    decode_sequence_s=0.001, push_step_s=0.005, push_token_s=0.00001,
)  # fmt: skip


def patches(names: list[str], rows: int = 64) -> list[m.Patch]:
    return [m.Patch(patch_hash=name, modality="image", num_tokens=rows) for name in names]


def workload(seed: int, num_requests: int, seconds: float) -> list[Item]:
    """Requests with 0 to 4 patches, some of which are the same."""
    rng = random.Random(f"workload {seed}")
    times = sorted(rng.uniform(0, seconds) for _ in range(num_requests))
    items = []
    for i, at_s in enumerate(times):
        names = rng.sample([f"patch {k}" for k in range(40)], rng.randrange(5))
        starts = [10 + 70 * k for k in range(len(names))]
        num_prompt_tokens = 20 + 70 * len(names) + rng.randrange(200)
        items.append(
            Item(
                at_s,
                f"r{i}",
                num_prompt_tokens,
                rng.randint(1, 40),
                patches(names),
                starts,
                tenant=rng.choice("ab"),
                prefill_samples=rng.random() < 0.7,
            )
        )
    return items


# ---- times -----------------------------------------------------------------------------------------------------------


def test_a_request_alone_takes_what_its_stages_take_one_after_the_other() -> None:
    item = Item(0.0, "r", 1000, 5, patches(["a", "b"]))
    [timing] = simulate(Pipeline(Shape(encode=1), costs=COSTS, latency_s=0.001), [item]).timings
    encode_s, prefill_s, push_s = 0.01 + 2 * 0.05, 0.02 + 1000 * 0.0001, 0.005 + 1000 * 0.00001
    there_and_back_s = 6 * 0.001  # SUBMIT, ENCODE, ENCODED, READY, PREFILLED, OUTPUTS
    assert timing.ttft_s == pytest.approx(encode_s + prefill_s + there_and_back_s)
    # Decode gets the KV after the push, and its last token goes through the broker, as the first has done.
    assert timing.e2e_s == pytest.approx(timing.ttft_s + push_s + 4 * 0.011)
    assert timing.tpot_s == pytest.approx((push_s + 4 * 0.011) / 4)


def test_patches_of_a_request_are_encoded_on_all_workers_at_once() -> None:
    item = Item(0.0, "r", 10, 1, patches([f"p{i}" for i in range(8)]))
    ttft_s = {
        encode: simulate(Pipeline(Shape(encode=encode), costs=Costs(encode_patch_s=1.0)), [item]).timings[0].ttft_s
        for encode in (1, 2, 4, 8)
    }
    assert ttft_s == {1: 8.0, 2: 4.0, 4: 2.0, 8: 1.0}


def test_a_batch_of_the_encoder_has_no_more_rows_than_it_takes() -> None:
    info = msgspec.structs.replace(ENCODE_INFO, max_batch_tokens=128)
    pipeline = Pipeline(Shape(encode_info=info), costs=COSTS)
    batches = said(pipeline, m.Encoded)
    simulate(pipeline, [Item(0.0, "r", 10, 1, patches([f"p{i}" for i in range(5)], rows=64))])
    assert [len(message.jobs) for message in batches] == [2, 2, 1]


def test_text_before_a_missing_patch_is_prefilled_while_the_patch_is_encoded() -> None:
    item = Item(0.0, "r", 1000, 1, patches(["a"]), starts=[900])
    costs = Costs(encode_step_s=0.09, prefill_token_s=0.0001)
    [timing] = simulate(Pipeline(Shape(), costs=costs), [item]).timings
    assert timing.ttft_s == pytest.approx(0.1)  # instead of 0.19


def test_a_prefill_step_has_no_more_tokens_than_it_takes() -> None:
    items = [Item(at_s, f"r{at_s}", 600, 1) for at_s in (0.0, 0.25, 0.5)]
    pipeline = Pipeline(Shape(max_batched_tokens=1000), costs=Costs(prefill_step_s=1.0))
    # Then a step with all of the second prompt and 400 tokens of the third.
    assert [timing.ttft_s for timing in simulate(pipeline, items).timings] == [1.0, 1.75, 2.5]


def test_all_legs_of_a_decode_worker_share_its_steps_and_its_messages() -> None:
    pipeline = Pipeline(Shape(), costs=Costs(decode_step_s=0.1))
    steps = said(pipeline, m.StepOutputs)
    outcome = simulate(pipeline, [Item(0.0, "first", 10, 5), *(Item(0.05, f"r{i}", 10, 5) for i in range(19))])
    assert [len(message.outputs) for message in steps] == [1, 20, 20, 20, 19]
    assert outcome.timings[0].e2e_s == pytest.approx(0.4)
    assert all(timing.e2e_s == pytest.approx(0.45) for timing in outcome.timings[1:])


def test_the_broker_learns_from_heartbeats_what_work_costs() -> None:
    costs = Costs(encode_row_s=0.001, prefill_token_s=0.0002, decode_sequence_s=0.003)
    pipeline = Pipeline(Shape(), costs=costs)
    simulate(pipeline, [Item(i * 0.5, f"r{i}", 100, 20, patches([f"p{i}"])) for i in range(10)])
    learnt = {str(one.stage): one.cost.s_per_unit for one in pipeline.broker.core.registry.workers.values()}
    assert learnt == pytest.approx({"encode": 0.001, "prefill": 0.0002, "decode": 0.003})


def test_a_worker_on_another_host_is_reached_too() -> None:
    shape = Shape(encode=2, prefill=2, decode=2, hosts=("here", "there"))
    pipeline = Pipeline(shape, costs=COSTS)
    outcome = simulate(pipeline, workload(1, 60, 10.0))
    assert outcome.ends == {"finished": 60}
    assert all(worker.num_steps for worker in pipeline.workers)


# ---- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["encode", "prefill", "decode", "cache", "broker"])
def test_every_request_ends_whole_when_a_process_is_killed_and_nothing_stays_held(what: str) -> None:
    pipeline = Pipeline(Shape(encode=2, prefill=2, decode=2), costs=COSTS, latency_s=0.001)
    victim = {"cache": pipeline.caches[0], "broker": pipeline.broker}.get(what) or getattr(pipeline, what)[0]
    for at_s in (3.0, 9.0):
        pipeline.clock.after(at_s, victim.kill)
    items = workload(2, 80, 10.0)
    outcome = simulate(pipeline, items)
    assert outcome.ends == {"finished": 80}
    assert {one.request_id: one.num_tokens for one in outcome.timings} == {i.request_id: i.num_outputs for i in items}
    pipeline.clock.run(5.0)
    assert not pipeline.held()


@pytest.mark.parametrize("stage", ["encode", "prefill", "decode"])
def test_a_worker_that_drains_finishes_what_it_has_and_leaves(stage: str) -> None:
    pipeline = Pipeline(Shape(encode=2, prefill=2, decode=2), costs=COSTS, latency_s=0.001)
    worker = getattr(pipeline, stage)[0]
    goodbyes = said(pipeline, m.Goodbye)
    pipeline.clock.after(4.0, worker.drain)
    outcome = simulate(pipeline, workload(3, 60, 8.0))
    assert outcome.ends == {"finished": 60}
    assert (len(goodbyes), worker.alive, outcome.counters.num_retried) == (1, False, 0)
    pipeline.clock.run(5.0)
    assert not pipeline.held()


def test_a_worker_that_hangs_is_lost_and_its_requests_go_on_elsewhere() -> None:
    pipeline = Pipeline(Shape(encode=2, prefill=2, decode=2), costs=COSTS, latency_s=0.001)
    pipeline.clock.after(3.0, lambda: pipeline.decode[0].hang(20.0))
    outcome = simulate(pipeline, workload(4, 60, 8.0))
    assert outcome.ends == {"finished": 60}
    assert outcome.counters.num_retried > 0


def test_a_client_that_goes_away_leaves_nothing() -> None:
    pipeline = Pipeline(Shape(), costs=COSTS)
    for at_s in (1.05, 1.1, 1.2, 1.4):
        pipeline.clock.after(at_s, lambda: [*map(pipeline.endpoint.cancel, list(pipeline.endpoint.flights.values()))])
    outcome = simulate(pipeline, [Item(i * 0.05, f"r{i}", 300, 30, patches([f"p{i}"])) for i in range(8)])
    assert outcome.ends == {"cancelled": 8}
    pipeline.clock.run(5.0)
    assert not pipeline.held()


def test_what_the_pipeline_refuses_ends_with_the_reason() -> None:
    info = msgspec.structs.replace(KV_INFO, kv_capacity_tokens=500)
    pipeline = Pipeline(Shape(decode_info=info, pool_bytes=1 << 16), BrokerConfig(max_queued=1), costs=COSTS)
    many = [Item(1.0, f"more {i}", 400, 9, max_tokens=90) for i in range(3)]
    items = [Item(0.0, "long", 600, 9), Item(0.0, "wide", 60, 9, patches(["p"], rows=10_000)), *many]
    ends = {timing.request_id: timing.end for timing in simulate(pipeline, items).timings}
    assert ends == {
        "long": "too_large", "wide": "too_large", "more 0": "finished", "more 1": "finished", "more 2": "overloaded"
    }  # fmt: skip


# ---- the same again --------------------------------------------------------------------------------------------------


def said(pipeline: Pipeline, kind: type) -> list:
    """Gets all messages of one kind, as they are sent."""
    found: list = []

    def observe(now: float, source: str, target: str, message: m.Message, frames: object) -> None:
        if isinstance(message, kind):
            found.append(message)

    pipeline.observe = observe
    return found


def digest_of_a_stormy_run(seed: int) -> str:
    """Of all messages of a run in which processes die, hang and leave: when, from whom, to whom, and their bytes."""
    rng = random.Random(f"storm {seed}")
    shape = Shape(encode=3, prefill=2, decode=3, hosts=("a", "b"), pool_bytes=1 << 18)
    pipeline = Pipeline(shape, BrokerConfig(prefill_choice="affine", patch_order="edf"), COSTS, 0.0005)
    found = hashlib.blake2b()

    def observe(now: float, source: str, target: str, message: m.Message, frames: list[bytes]) -> None:
        head = f"{now!r} {source} {target}".encode()
        for part in (head, *wire.encode(message, frames)):
            found.update(len(part).to_bytes(4, "big") + part)

    pipeline.observe = observe
    for victim in rng.sample([pipeline.broker, pipeline.caches[0], *pipeline.workers], 4):
        do = rng.choice([victim.kill, lambda victim=victim: victim.hang(5.0)])
        pipeline.clock.after(rng.uniform(1.0, 8.0), do)
    pipeline.clock.after(4.0, pipeline.encode[0].drain)
    outcome = simulate(pipeline, workload(seed, 150, 8.0))
    found.update(repr(outcome).encode())
    return found.hexdigest()


def in_another_process(seed: int, hash_seed: str) -> str:
    code = f"from {__name__} import digest_of_a_stormy_run; print(digest_of_a_stormy_run({seed}))"
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_the_same_seed_gives_the_same_bytes_whatever_the_seed_of_hashes() -> None:
    digests = {in_another_process(5, hash_seed) for hash_seed in ("1", "2", "3")}
    assert len(digests) == 1
    assert digests == {digest_of_a_stormy_run(5)}
    assert digest_of_a_stormy_run(6) not in digests


def test_a_long_workload_is_read_as_time_passes() -> None:
    read = 0

    def items() -> Iterator[Item]:
        nonlocal read
        for i in range(1000):
            read += 1
            yield Item(float(i), f"r{i}", 10, 2)

    outcome = simulate(Pipeline(Shape(), costs=COSTS), items(), within_s=10.5)
    assert outcome.num_finished == 11
    assert read == 12

"""The stages' own bookkeeping, with a stand-in for the engine: what is handed back, cut, counted and ignored."""

from __future__ import annotations

import sys
from concurrent.futures import Future
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from cache.slot import StaleSlotError
from epd import messages as m
from epd.config import Config
from workers.decode import DecodeStage
from workers.encode import EncodeStage
from workers.prefill import PrefillStage


class Tensors(NamedTuple):
    """As `vllm.v1.outputs.LogprobsTensors`: one row for each token of the prompt but the first."""

    logprob_token_ids: list[int]
    logprobs: list[float]
    selected_token_ranks: list[int]
    cu_num_generated_tokens: list[int] | None = None


class StandIn:
    """An engine that does what a test tells it."""

    def __init__(self, *_: object) -> None:
        self.added: list[tuple] = []
        self.aborted: list[str] = []
        self.outputs: list[SimpleNamespace] = []
        self.is_last = False
        self.given: list[tuple] = []
        self.lacking: set[str] = set()
        self.written = SimpleNamespace(done={"1"}, failed={}, unstored={}, storing=set(), num_unsettled=0)
        self.has_requests = lambda: False
        nothing = lambda *_: None  # noqa: E731
        self.connector = SimpleNamespace(
            forget=nothing,
            forget_job=nothing,
            patch_ready=nothing,
            expect=nothing,
            take_needed=dict,
            look_at_unwritten=list,
            num_unwritten=0,
        )

    def info(self) -> m.WorkerInfo:
        return m.WorkerInfo()

    def add_encode(self, job: m.EncodeJob, frames: list[bytes]) -> str:
        self.added.append((job.job_id,))
        return str(job.job_id)

    def add_prefill(self, *args: object, keeps_kv: bool = True) -> bool:
        self.added.append(args)
        self.keeps_kv = keeps_kv
        return self.is_last

    add_decode = add_prefill

    def give_token(self, leg_id: str, token_ids: list[int]) -> bool:
        self.given.append((leg_id, token_ids))
        return len(self.given) == 1

    def lacking_token(self) -> set[str]:
        return self.lacking

    def waiting(self) -> list[str]:
        return [str(one) for (one,) in self.added[1:]]  # the first one has been started

    def abort(self, names: list[str]) -> None:
        self.aborted += names

    def step(self) -> tuple[list[SimpleNamespace], bool]:
        outputs, self.outputs = self.outputs, []
        return outputs, True

    def take_written(self) -> SimpleNamespace:
        written, self.written = (
            self.written,
            SimpleNamespace(done=set(), failed={}, unstored={}, storing=set(), num_unsettled=0),
        )
        return written

    def holds(self, request_id: str) -> bool:
        return True

    def pack(self, output: SimpleNamespace) -> list[bytes]:
        return [b"packed"]


def output(ids: list[int], reason: str | None = None, pushed: int | None = None) -> SimpleNamespace:
    """As vLLM's engine output."""
    return SimpleNamespace(
        request_id="r~1", new_token_ids=ids, finished=reason is not None, finish_reason=reason,
        prefill_stats=None if pushed is None else SimpleNamespace(num_external_cached_tokens=pushed),
        new_prompt_logprobs_tensors=None,
    )  # fmt: skip


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[m.Message]:
    """What a stage has sent, in order."""
    monkeypatch.setitem(sys.modules, "workers.engine", SimpleNamespace(Engine=StandIn))
    nothing_proved = SimpleNamespace(prove_units=lambda engine: [], with_units=lambda info, proofs: info)
    monkeypatch.setitem(sys.modules, "workers.proving", nothing_proved)
    return []


def make(kind: type, said: list[m.Message]) -> tuple:
    """A stage that has been started, and its engine."""
    stage = kind(Config(), "w", lambda message, frames: said.append(message), lambda command, *args: command(*args))
    stage.start()
    return stage, stage.engine


def job(number: int) -> m.EncodeJob:
    slot = m.Slot(pool_id="p", offset=0, nbytes=1, generation=number, num_tokens=1, width=1, dtype="float32")
    return m.EncodeJob(job_id=number, patch_hash="h", modality="image", num_tokens=1, num_frames=0, slot=slot)


def test_a_draining_encode_worker_hands_back_what_it_has_not_started(said: list[m.Message]) -> None:
    stage, engine = make(EncodeStage, said)
    stage.handle(m.Encode(jobs=[job(1), job(2), job(3)]), [])
    stage.drain()
    assert engine.aborted == ["2", "3"]
    assert [(one.job_id, one.dropped) for one in said] == [(2, True), (3, True)]
    stage.handle(m.Encode(jobs=[job(4)]), [])  # it was on its way
    assert (said[-1].job_id, said[-1].dropped) == (4, True)
    stage.step()
    assert [one.job_id for one in said[-1].jobs] == [1]


def test_what_is_on_its_way_to_another_host_is_reported_when_it_is_there(said: list[m.Message]) -> None:
    stage, engine = make(EncodeStage, said)
    stage.handle(m.Encode(jobs=[job(1), job(2), job(3)]), [])
    engine.written = SimpleNamespace(done={"1"}, failed={}, unstored={}, storing={"2", "3"}, num_unsettled=0)
    engine.outputs = [SimpleNamespace(request_id=name, finished=True, finish_reason="length") for name in "123"]
    stage.step()
    assert [[one.job_id for one in each.jobs] for each in said] == [[1]]
    assert stage.has_work()
    assert 0 < stage.poll_s(1) < stage.poll_s(9) <= 0.02
    took_s = said[0].took_s
    stage.handle(m.DropEncode(job_id=2), [])
    assert not engine.aborted, "it is in its slot soon"
    engine.written = SimpleNamespace(
        done={"2"}, failed={}, unstored={"3": "its host does not answer"}, storing=set(), num_unsettled=0
    )
    stage.step()
    assert [one.job_id for one in said[1].jobs] == [2]
    assert said[1].took_s == pytest.approx(took_s), "what its encoding took"
    assert (said[2].job_id, said[2].message, said[2].unstored) == (3, "its host does not answer", True)
    assert not stage.has_work()
    assert not stage._jobs


def test_an_encode_worker_that_loses_its_broker_waits_for_what_is_on_its_way(said: list[m.Message]) -> None:
    stage, engine = make(EncodeStage, said)
    stage.handle(m.Encode(jobs=[job(1)]), [])
    engine.written = SimpleNamespace(done=set(), failed={}, unstored={}, storing={"1"}, num_unsettled=0)
    stage.step()
    ways = [
        SimpleNamespace(done=set(), failed={}, unstored={}, storing=set(storing), num_unsettled=0)
        for storing in (["1"], [])
    ]
    engine.take_written = lambda: ways.pop(0)
    stage.reset()
    assert not ways, "the next broker's first job is number 1 too"
    assert not stage.has_work()


@pytest.mark.parametrize("kind", [PrefillStage, DecodeStage])
def test_a_patch_of_another_host_is_stale_for_all_who_wait_for_it(said: list[m.Message], kind: type) -> None:
    stage, engine = make(kind, said)
    fetch: Future[memoryview] = Future()
    engine.connector.patch_ready = lambda *_: fetch
    engine.connector.readers = lambda _: ["r~1", "r~2"]

    def fetched(patch_hash: str, slot: m.Slot, done: Future) -> None:
        done.result()

    engine.connector.patch_fetched = fetched
    peer = m.KvPeer(engine_id="e", host="h", port=1)
    for leg in ("r~1", "r~2"):
        stage.handle(m.Prefill(leg_id=leg) if kind is PrefillStage else m.Decode(leg_id=leg, prefill=peer), [])
    stage.handle(m.Ready(leg_id="r~1", ready=[m.PatchReady(patch_hash="h", slot=job(7).slot)]), [])
    assert not said
    fetch.set_exception(StaleSlotError("its host does not answer"))
    assert [one.leg_id for one in said] == ["r~1", "r~2"]
    if kind is PrefillStage:
        assert [(one.patch_hash, one.generation, one.reason) for one in said] == [
            ("h", 7, "its host does not answer")
        ] * 2
    else:
        assert [one.code for one in said] == ["preempted"] * 2


def test_a_decode_worker_expects_nothing_for_a_request_that_it_has_not(said: list[m.Message]) -> None:
    stage, engine = make(DecodeStage, said)
    engine.connector.expect = lambda *_: pytest.fail("nobody would forget it")
    stage.handle(m.Ready(leg_id="gone", ready=[m.PatchReady(patch_hash="h", slot=job(1).slot)]), [])


def test_the_first_job_may_come_twice_and_is_encoded_once(said: list[m.Message]) -> None:
    stage, engine = make(EncodeStage, said)
    for _ in range(2):
        stage.handle(m.Encode(jobs=[job(1)]), [])
    assert engine.added == [(1,)]


def test_prompt_log_probabilities_of_a_leg_that_goes_on_are_those_of_the_prompt_alone(said: list[m.Message]) -> None:
    stage, engine = make(PrefillStage, said)
    stage.handle(m.Prefill(leg_id="r~1", output_token_ids=[7, 8]), [b"engine"])
    assert engine.added == [("r~1", [b"engine"], [7, 8], False)]
    output = SimpleNamespace(
        request_id="r~1", finished=True, finish_reason="length", prefill_stats=None,
        new_prompt_logprobs_tensors=Tensors([1, 2, 3, 7, 8], [0.1, 0.2, 0.3, 0.7, 0.8], [1, 1, 1, 2, 2]),
    )  # fmt: skip
    engine.outputs = [output]
    stage.step()
    assert output.new_prompt_logprobs_tensors == Tensors([1, 2, 3], [0.1, 0.2, 0.3], [1, 1, 1])
    assert [type(one) for one in said] == [m.Prefilled]


def test_a_decode_worker_says_where_its_tokens_belong(said: list[m.Message]) -> None:
    stage, engine = make(DecodeStage, said)
    peer = m.KvPeer(engine_id="e", host="h", port=1)
    decode = m.Decode(leg_id="r~1", prefill=peer, output_token_ids=[7, 8])
    for _ in range(2):  # the second one is ignored
        stage.handle(decode, [b"engine"])
    assert engine.added == [("r~1", [b"engine"], peer, [7, 8], False)]
    for ids, finished in (([1, 2], False), ([3], True)):
        engine.outputs = [output(ids, "stop" if finished else None, None if finished else 64)]
        stage.step()
    outputs = [one for step in said for one in step.outputs]
    assert [(one.finish_reason, one.num_before, one.token_ids, one.num_pushed_tokens) for one in outputs] == [
        ("", 2, [1, 2], 64),
        ("stop", 4, [3], -1),
    ]


def test_a_decode_worker_goes_on_after_the_token_that_it_is_given(said: list[m.Message]) -> None:
    stage, engine = make(DecodeStage, said)
    peer = m.KvPeer(engine_id="e", host="h", port=1)
    stage.handle(m.Decode(leg_id="r~1", prefill=peer, output_token_ids=[7, 8], awaits_token=True), [b"engine"])
    assert engine.added == [("r~1", [b"engine"], peer, [7, 8], True)]
    stage.handle(m.Prefilled(leg_id="r~1", token_ids=[9]), [])
    stage.handle(m.Prefilled(leg_id="unknown", token_ids=[9]), [])
    assert engine.given == [("r~1", [9])]
    stage.handle(m.Prefilled(leg_id="r~1", token_ids=[9]), [])  # once more: it counts once
    engine.outputs = [output([1])]
    stage.step()
    [one] = said[-1].outputs
    assert (one.num_before, one.token_ids) == (3, [1])


def test_a_decode_worker_gives_up_a_request_whose_token_does_not_come(said: list[m.Message]) -> None:
    stage, engine = make(DecodeStage, said)
    now = 0.0
    stage.clock = lambda: now
    peer = m.KvPeer(engine_id="e", host="h", port=1)
    stage.handle(m.Decode(leg_id="r~1", prefill=peer, awaits_token=True), [b"engine"])
    engine.lacking = {"r~1"}
    stage.step()
    now = 4.9
    stage.step()
    assert not said
    now = 5.1
    stage.step()
    assert [(one.leg_id, one.code) for one in said] == [("r~1", "worker_lost")]
    assert engine.aborted == ["r~1"]


@pytest.mark.parametrize(
    ("reason", "is_last", "samples", "told"),
    [
        ("length", False, True, ([5], "")),
        ("length", True, True, ([5], "length")),
        ("stop", False, True, ([5], "stop")),
        ("length", True, False, ([], "")),
    ],
)
def test_a_prefill_worker_tells_its_token_and_whether_it_is_the_last_one(
    said: list[m.Message], reason: str, is_last: bool, samples: bool, told: tuple[list[int], str]
) -> None:
    stage, engine = make(PrefillStage, said)
    engine.is_last = is_last
    stage.handle(m.Prefill(leg_id="r~1", samples=samples), [b"engine"])
    assert engine.added == [("r~1", [b"engine"], [], samples)]
    assert engine.keeps_kv
    engine.outputs = [output([5], reason)]
    stage.step()
    assert [(one.token_ids, one.finish_reason) for one in said] == [told]
    engine.holds = lambda leg_id: False
    stage.step()
    assert isinstance(said[-1], m.Pushed) is (not told[1]), "a push is awaited unless the request has ended"


def test_a_prefill_worker_keeps_no_kv_for_an_answer_of_one_token(said: list[m.Message]) -> None:
    stage, engine = make(PrefillStage, said)
    stage.handle(m.Prefill(leg_id="r~1", samples=True, is_last=True), [b"engine"])
    assert not engine.keeps_kv
    engine.outputs = [output([5], "length")]
    stage.step()
    assert [(one.token_ids, one.finish_reason) for one in said] == [([5], "length")]
    assert not stage._pushing


def test_an_encode_worker_looks_after_copies_that_have_not_run(said: list[m.Message]) -> None:
    stage, engine = make(EncodeStage, said)
    stage.handle(m.Encode(jobs=[job(1)]), [])
    engine.written.num_unsettled = 1
    stage.step()
    assert [one.job_id for one in said[-1].jobs] == [1], "readers see when it is written"
    assert stage.has_work(), "should it die, only what is settled can be read"
    assert 0 < stage.poll_s(1) < 0.01
    stage.step()
    assert not stage.has_work()


@pytest.mark.parametrize("kind", [PrefillStage, DecodeStage])
def test_slots_that_are_not_written_yet_are_looked_at_often_and_may_never_be(said: list[m.Message], kind: type) -> None:
    stage, engine = make(kind, said)
    peer = m.KvPeer(engine_id="e", host="h", port=1)
    stage.handle(m.Prefill(leg_id="r~1") if kind is PrefillStage else m.Decode(leg_id="r~1", prefill=peer), [])
    engine.kv_arrived = lambda: False
    slow_s = stage.poll_s(5)
    engine.connector.num_unwritten = 1
    assert stage.poll_s(5) < slow_s
    engine.connector.readers = lambda _: ["r~1"]
    engine.connector.look_at_unwritten = lambda: [("h", job(7).slot, "its writer is dead")]
    stage.step()
    assert said[0].leg_id == "r~1"
    assert "its writer is dead" in (said[0].reason if kind is PrefillStage else said[0].message)

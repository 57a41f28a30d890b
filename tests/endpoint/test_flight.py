"""What prefill and decode send, put together as one engine would have sent it."""

import pytest

pytestmark = pytest.mark.engine


def make(token_ids=(), finish=False, rows=None, **fields):
    import torch
    from vllm.v1.engine import EngineCoreOutput, FinishReason
    from vllm.v1.outputs import LogprobsTensors

    if rows:
        fields["new_prompt_logprobs_tensors"] = LogprobsTensors(
            torch.full((rows, 2), rows), torch.zeros(rows, 2), torch.ones(rows, dtype=torch.int64)
        )
    reason = FinishReason.LENGTH if finish else None
    return EngineCoreOutput("theirs", list(token_ids), finish_reason=reason, **fields)


def flight(wants=False, num_prompt_tokens=9, may_resume=True, prefill_samples=True, **params):
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    from epd.endpoint.engine.flight import Flight
    from epd.multimodal.splitter import Split

    sampling = SamplingParams(temperature=0.0, prompt_logprobs=1 if wants else None, **params)
    request = EngineCoreRequest("r", [5] * num_prompt_tokens, None, sampling, None, 0.0, None, None, None)
    return Flight(request, Split([], [], []), may_resume=may_resume, prefill_samples=prefill_samples)


def test_outputs_pass_under_our_id_with_events_of_our_clock():
    from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType

    theirs = [EngineCoreEvent.new_event(EngineCoreEventType.PREEMPTED, 1e12)]
    one = flight()
    (first,) = one.output(make([1], events=theirs))
    (second,) = one.output(make([2], finish=True, events=theirs))
    assert first.request_id == second.request_id == "r"
    assert [event.type.name for event in first.events] == ["QUEUED", "SCHEDULED"]
    assert all(event.timestamp < 1e12 for event in first.events)
    assert second.finished


def test_prompt_logprobs_go_with_the_first_output_in_their_order():
    one = flight(wants=True)
    assert one.partial(make(rows=2)) == []
    assert one.partial(make(rows=3)) == []
    (first,) = one.output(make([1]))
    assert first.new_prompt_logprobs_tensors.logprob_token_ids[:, 0].tolist() == [2, 2, 3, 3, 3]
    (second,) = one.output(make([2], rows=1))
    assert second.new_prompt_logprobs_tensors is None


def test_outputs_wait_for_prompt_logprobs_that_come_late():
    one = flight(wants=True)
    assert one.output(make([1], rows=1)) == []
    assert one.output(make([2])) == []
    first, second = one.partial(make(rows=4))
    assert first.new_token_ids == [1] and second.new_token_ids == [2]
    assert len(first.new_prompt_logprobs_tensors.logprobs) == 4
    assert second.new_prompt_logprobs_tensors is None
    assert [each.new_token_ids for each in one.output(make([3], finish=True))] == [[3]]


def test_a_request_that_ends_without_them_is_an_error():
    from epd.endpoint.engine.flight import IncompleteOutputError

    one = flight(wants=True)
    with pytest.raises(IncompleteOutputError):
        one.output(make([1], finish=True, rows=1))


def test_events_of_a_worker_that_goes_on_do_not_set_the_clock_back():
    from vllm.v1.engine import EngineCoreEvent, EngineCoreEventType

    kinds = [EngineCoreEventType.QUEUED, EngineCoreEventType.SCHEDULED, EngineCoreEventType.PREEMPTED]
    theirs = [EngineCoreEvent.new_event(kind, 1e12) for kind in kinds]
    one = flight()
    one.output(make([1]))
    (second,) = one.output(make([2], events=theirs))
    assert [event.type.name for event in second.events] == ["PREEMPTED"]


def test_a_request_goes_on_with_the_tokens_it_has():
    one = flight()
    one.output(make([1, 2]))
    one.output(make([3]))
    assert one.start_over() and one.token_ids == [1, 2, 3]
    assert [each.new_token_ids for each in one.output(make([4], finish=True))] == [[4]]
    assert 0 < one.left_s(600) <= 600


@pytest.mark.parametrize("options", [{"presence_penalty": 0.5}, {"may_resume": False}])
def test_a_request_with_tokens_that_cannot_go_on_does_not(options):
    one = flight(**options)
    assert one.start_over(), "it has no tokens yet"
    one.output(make([1]))
    assert not one.start_over()


def test_a_request_whose_frames_were_let_go_of_does_not_start_over():
    one = flight()
    one.parts = None
    assert not one.start_over()


def test_what_was_not_passed_on_is_forgotten_and_comes_again():
    one = flight(wants=True)
    assert one.output(make([1])) == [], "it waits for the prompt's log-probabilities"
    assert one.start_over() and one.token_ids == []
    assert one.partial(make(rows=8)) == []
    (first,) = one.output(make([1]))
    assert len(first.new_prompt_logprobs_tensors.logprobs) == 8


def test_prompt_logprobs_that_were_passed_on_are_neither_repeated_nor_waited_for():
    one = flight(wants=True)
    one.partial(make(rows=8))
    one.output(make([1]))
    assert one.start_over()
    assert one.partial(make(rows=9)) == []
    (second,) = one.output(make([2], finish=True))
    assert second.new_prompt_logprobs_tensors is None and one.token_ids == [1, 2]


def test_a_prompt_that_was_computed_twice_gives_its_logprobs_once():
    one = flight(wants=True)
    one.partial(make(rows=8))
    one.partial(make(rows=10))
    (first,) = one.output(make([1]))
    assert first.new_prompt_logprobs_tensors.logprob_token_ids[:, 0].tolist() == [8] * 8


@pytest.mark.parametrize(("told", "cached"), [(48, 48), (0, 0), (-1, 32), (102, 100)])
def test_cached_tokens_are_those_that_prefill_did_not_compute_not_those_that_decode_did_not(told, cached):
    from vllm.v1.metrics.stats import PrefillStats

    stats = PrefillStats()
    stats.set(num_prompt_tokens=100, num_local_cached_tokens=32, num_external_cached_tokens=68)
    one = flight(num_prompt_tokens=100)
    one.part.num_cached_tokens = told
    (first,) = one.output(make([1], prefill_stats=stats))
    assert first.prefill_stats.num_cached_tokens == first.prefill_stats.num_local_cached_tokens == cached
    assert first.prefill_stats.num_computed_tokens == 100 - cached
    assert first.prefill_stats.num_external_cached_tokens == 0


@pytest.mark.parametrize(
    ("options", "samples"),
    [
        ({}, True),
        ({"min_tokens": 3, "logprobs": 2}, True),
        ({"presence_penalty": 0.5}, False),
        ({"wants": True}, False),
        ({"may_resume": False}, False),
        ({"prefill_samples": False}, False),
    ],
)
def test_first_tokens_are_sampled_by_prefill_where_decode_can_go_on_after_them(options, samples):
    assert flight(**options).prefill_samples is samples

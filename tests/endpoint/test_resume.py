"""Which requests may go on elsewhere from the tokens they have."""

import pytest

pytestmark = pytest.mark.engine

FINE = [
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1},
    {"temperature": 0.0, "seed": 7},
    {"temperature": 0.0, "repetition_penalty": 1.2},
    {"temperature": 0.0, "logit_bias": {3: 1.0}, "allowed_token_ids": [3, 4]},
    {"temperature": 0.0, "stop": ["x"], "stop_token_ids": [5], "ignore_eos": True, "min_tokens": 3, "max_tokens": 9},
    {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 1, "logprob_token_ids": [1]},
    {"temperature": 0.0, "bad_words": [], "extra_args": {}, "skip_reading_prefix_cache": True},
    {"temperature": 0.0, "watermarking": False},
]
WRONG = [
    {"temperature": 0.7, "seed": 7},
    {"temperature": 0.0, "presence_penalty": 0.5},
    {"temperature": 0.0, "frequency_penalty": -0.5},
    {"temperature": 0.0, "bad_words": ["no"]},
    {"temperature": 0.0, "thinking_token_budget": 5},
    {"temperature": 0.0, "extra_args": {"theirs": 1}},
    {"temperature": 0.0, "trace_decode_token_ids": [1, 2]},
    {"temperature": 0.0, "routed_experts_prompt_start": 1},
    {"temperature": 0.0, "watermarking": True},
    {"temperature": 0.7, "n": 2},
    {"temperature": 0.0, "prompt_logprob_token_ids": [[1, 2]]},
]


def params(fields):
    from vllm import SamplingParams

    return SamplingParams(**fields)


@pytest.mark.parametrize("fields", FINE, ids=str)
def test_what_sees_prompt_and_output_as_one_sequence_goes_on(fields):
    from epd.endpoint.engine.resume import resumable

    assert resumable(params(fields))


@pytest.mark.parametrize("fields", WRONG, ids=str)
def test_what_sees_the_output_alone_or_keeps_state_does_not(fields):
    from epd.endpoint.engine.resume import resumable

    assert not resumable(params(fields))


def test_grammars_and_repetition_detection_do_not_go_on():
    from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

    from epd.endpoint.engine.resume import resumable

    detection = RepetitionDetectionParams(max_pattern_size=4, min_pattern_size=2, min_count=3)
    assert not resumable(params({"temperature": 0.0, "structured_outputs": StructuredOutputsParams(regex="a+")}))
    assert not resumable(params({"temperature": 0.0, "repetition_detection": detection}))


def test_each_choice_of_several_goes_on_by_itself():
    from copy import copy

    from epd.endpoint.engine.resume import resumable

    child = copy(params({"temperature": 0.7, "n": 2}))
    child.n = 1  # as vLLM makes them (`ParentRequest`)
    assert resumable(child)


def test_params_that_went_through_vllms_own_checks_still_go_on():
    from epd.endpoint.engine.resume import resumable

    one = params({"temperature": 0.0})
    one.update_from_generation_config({}, 2)
    one.watermarking = False
    assert resumable(one)


def test_every_field_of_vllms_sampling_params_is_classified():
    from vllm import SamplingParams

    from epd.endpoint.engine.resume import DECIDED, HARMLESS, ONLY

    known = HARMLESS | set(ONLY) | DECIDED
    fields = set(SamplingParams.__struct_fields__)
    assert fields - known == set(), "new in vLLM: can a request with it go on elsewhere? Say so in resume.py"
    assert known - fields == set(), "gone from vLLM: drop it from resume.py"
    assert len(HARMLESS) + len(ONLY) + len(DECIDED) == len(known), "each field stands in one place"

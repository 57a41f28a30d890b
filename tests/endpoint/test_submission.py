"""What SUBMIT tells of a prompt's beginnings, and outputs that need no frames, on both sides of the wire."""

import pytest

pytestmark = pytest.mark.engine


def request(num_tokens, salt=None, first=5):
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest

    tokens = [first, *range(6, 5 + num_tokens)]
    return EngineCoreRequest("r", tokens, None, SamplingParams(), None, 0.0, None, salt, None)


def names(*args, **fields):
    from epd.endpoint.engine.submission import prefix_hashes

    return prefix_hashes(request(*args, **fields))


def test_prompts_that_begin_alike_share_the_names_of_their_beginnings():
    short, long = names(600), names(1000)
    assert len(short) == 2 and len(long) == 3
    assert long[:2] == short
    assert len(set(long)) == 3


def test_what_has_other_kv_has_another_name():
    assert set(names(600)).isdisjoint(names(600, salt="a"))
    assert set(names(600)).isdisjoint(names(600, first=9))


def test_a_short_prompt_names_nothing_and_a_long_one_a_bounded_number_of_beginnings():
    assert names(200) == []
    assert len(names(100_000)) == 32


@pytest.mark.parametrize(("finish", "word"), [(None, ""), ("STOP", "stop"), ("LENGTH", "length")])
def test_a_plain_output_needs_no_frame_and_is_read_as_it_was(finish, word):
    from vllm.v1.engine import EngineCoreOutput, FinishReason

    from epd.endpoint.engine.outputs import OutputReader
    from epd.messages import RequestOutput
    from workers.outputs import OutputPacker

    reason = FinishReason[finish] if finish else None
    output = EngineCoreOutput("leg", [7, 8], finish_reason=reason)
    frames = OutputPacker().pack(output)
    assert frames == []
    told = RequestOutput(request_id="leg", token_ids=[7, 8], finish_reason=word)
    assert OutputReader().read(told, frames) == output


def test_an_output_that_says_anything_else_has_frames():
    """Each field of vLLM's output, whatever an upgrade adds."""
    import msgspec
    from vllm.v1.engine import EngineCoreOutput

    from workers.outputs import is_plain

    said_beside = {"request_id", "new_token_ids", "finish_reason"}
    others = [field for field in msgspec.structs.fields(EngineCoreOutput) if field.name not in said_beside]
    assert len(others) >= 10
    for field in others:
        assert not is_plain(EngineCoreOutput("leg", [7], **{field.name: object()})), field.name


def test_an_output_with_log_probabilities_is_read_as_it_was():
    import numpy as np
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.outputs import LogprobsLists

    from epd.endpoint.engine.outputs import OutputReader
    from epd.messages import RequestOutput
    from workers.outputs import OutputPacker

    logprobs = LogprobsLists(np.array([[7, 8]]), np.array([[-0.5, -1.0]], dtype=np.float32), np.array([1]))
    frames = OutputPacker().pack(EngineCoreOutput("leg", [7], new_logprobs=logprobs))
    assert frames
    read = OutputReader().read(RequestOutput(request_id="leg", token_ids=[7], num_frames=len(frames)), frames)
    assert read.new_logprobs.logprobs.tolist() == logprobs.logprobs.tolist()

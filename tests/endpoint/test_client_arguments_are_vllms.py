"""The Python client's arguments beside the fields of vLLM's chat request."""

from __future__ import annotations

from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

from epd.client.arguments import OF_THE_CLIENT, Arguments


def test_the_client_takes_the_fields_of_vllms_chat_request() -> None:
    sent = set(Arguments.__annotations__) - OF_THE_CLIENT
    fields = set(ChatCompletionRequest.model_fields)
    assert sent | {"messages", "stream", "logprobs"} == fields, "vLLM has other fields now: change `Arguments`"

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pytest
from fake_endpoint import DONE, ROLE, FakeEndpoint, complete, event, hang, hang_up, sse, streamed

from epd.client import APIError, AsyncClient, Chunk, NotFound, Overloaded, StreamInterrupted, Usage

LOGPROBS = {"content": [{"token": "a", "logprob": -0.1, "bytes": [97], "top_logprobs": []}]}


async def texts(client: AsyncClient, **arguments: Any) -> list[str]:
    return [chunk.text async for chunk in client.stream("?", **arguments)]


async def test_generate_returns_the_whole_answer(endpoint: FakeEndpoint, client: AsyncClient) -> None:
    answer = await client.generate("hi")
    assert (answer.text, answer.texts, answer.finish_reason) == ("hello", ("hello",), "stop")
    assert answer.usage == Usage(prompt_tokens=5, completion_tokens=2, total_tokens=7)
    assert answer.request_id == "chatcmpl-7"
    assert answer.raw["object"] == "chat.completion"
    assert endpoint.bodies == [{"messages": [{"role": "user", "content": "hi"}], "stream": False}]


async def test_every_argument_reaches_the_server(endpoint: FakeEndpoint, client: AsyncClient) -> None:
    await client.generate(
        "hi",
        model="m",
        max_tokens=3,
        temperature=0,
        top_p=0.5,
        seed=1,
        stop=["a", "b"],
        n=2,
        logprobs=4,
        system="be brief",
        top_k=7,
    )
    assert endpoint.bodies[0] == {
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
        "model": "m",
        "max_tokens": 3,
        "temperature": 0,
        "top_p": 0.5,
        "seed": 1,
        "stop": ["a", "b"],
        "n": 2,
        "logprobs": True,
        "top_logprobs": 4,
        "top_k": 7,
        "stream": False,
    }


@pytest.mark.parametrize(
    ("logprobs", "sent"),
    [
        (True, {"logprobs": True}),
        (False, {"logprobs": False}),
        (0, {"logprobs": True, "top_logprobs": 0}),
        (1, {"logprobs": True, "top_logprobs": 1}),
        (None, {}),
    ],
)
async def test_logprobs_are_asked_for_in_the_chat_form(
    endpoint: FakeEndpoint, client: AsyncClient, logprobs: bool | int | None, sent: dict[str, Any]
) -> None:
    await client.generate("hi", logprobs=logprobs)
    assert {key: value for key, value in endpoint.bodies[0].items() if "logprobs" in key} == sent


async def test_the_clients_model_and_key_go_with_every_call(endpoint: FakeEndpoint) -> None:
    async with AsyncClient(endpoint.url + "/v1/", api_key="k", model="mine") as client:
        await client.generate("hi")
        await client.generate("hi", model="other")
    assert [body["model"] for body in endpoint.bodies] == ["mine", "other"]
    assert endpoint.headers[0]["Authorization"] == "Bearer k"


async def test_messages_replace_the_prompt(endpoint: FakeEndpoint, client: AsyncClient) -> None:
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    await client.generate(messages=chat)
    await client.generate(messages=iter(chat), system="s")
    assert endpoint.bodies[0]["messages"] == chat
    assert endpoint.bodies[1]["messages"] == [{"role": "system", "content": "s"}, *chat]


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({}, TypeError),
        ({"messages": [], "images": [b"x"]}, ValueError),
        ({"prompt": "?", "messages": [{"role": "user", "content": "!"}]}, TypeError),
        ({"prompt": "", "messages": [{"role": "user", "content": "!"}]}, TypeError),
    ],
)
async def test_contradicting_arguments_are_refused(
    client: AsyncClient, arguments: dict[str, Any], kind: type[Exception]
) -> None:
    with pytest.raises(kind):
        await client.generate(**arguments)


async def test_several_answers_come_in_order(endpoint: FakeEndpoint, client: AsyncClient) -> None:
    endpoint.answer = complete("a", "b", "c", logprobs=LOGPROBS)
    answer = await client.generate("?", n=3)
    assert answer.texts == ("a", "b", "c")
    assert answer.text == "a"
    assert answer.logprobs == LOGPROBS


async def test_a_stream_gives_its_chunks(endpoint: FakeEndpoint, client: AsyncClient) -> None:
    endpoint.answer = streamed(
        ROLE, b": alive\n\n", event("a"), event("b", logprobs=LOGPROBS), event(finish="length"), DONE
    )
    chunks = [chunk async for chunk in client.stream("?")]
    assert [(c.text, c.finish_reason, c.logprobs) for c in chunks] == [
        ("a", None, None),
        ("b", None, LOGPROBS),
        ("", "length", None),
    ]
    assert {chunk.request_id for chunk in chunks} == {"chatcmpl-7"}
    assert endpoint.bodies[0]["stream"] is True


async def test_a_stream_of_several_answers_says_which_is_which(endpoint: FakeEndpoint, client: AsyncClient) -> None:
    endpoint.answer = streamed(
        event("a0"), event("b0", index=1), event("a1", finish="stop"), event("b1", index=1, finish="stop")
    )
    answers = {0: "", 1: ""}
    async for chunk in client.stream("?", n=2):
        answers[chunk.index] += chunk.text
    assert answers == {0: "a0a1", 1: "b0b1"}


async def test_token_counts_come_on_a_chunk_of_their_own(endpoint: FakeEndpoint, client: AsyncClient) -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}
    endpoint.answer = streamed(
        event("a", finish="stop"), sse({"id": "chatcmpl-7", "choices": [], "usage": usage}), DONE
    )
    chunks = [chunk async for chunk in client.stream("?", stream_options={"include_usage": True})]
    assert chunks[-1].usage == Usage(5, 1, 6)
    assert endpoint.bodies[0]["stream_options"] == {"include_usage": True}


async def test_tool_calls_are_not_lost(endpoint: FakeEndpoint, client: AsyncClient) -> None:
    delta = {"tool_calls": [{"index": 0, "function": {"name": "f"}}]}
    endpoint.answer = streamed(event(delta=delta), event(finish="tool_calls"), DONE)
    [first, _] = [chunk async for chunk in client.stream("?")]
    assert first.raw["choices"][0]["delta"] == delta


async def test_pieces_cut_in_the_middle_of_characters_and_lines_do_not_matter(
    endpoint: FakeEndpoint, client: AsyncClient
) -> None:
    whole = event("é漢") + b": comment\r\n" + event("😀\n").replace(b"\n", b"\r\n") + event(finish="stop") + DONE
    endpoint.answer = streamed(*(bytes([byte]) for byte in whole))
    assert "".join(await texts(client)) == "é漢😀\n"


@pytest.mark.parametrize("pieces", [(), (ROLE,), (event("a"),), (event("a"), DONE[:-2])])
async def test_a_stream_that_ends_early_is_interrupted(
    endpoint: FakeEndpoint, client: AsyncClient, pieces: tuple[bytes, ...]
) -> None:
    endpoint.answer = streamed(*pieces)
    with pytest.raises(StreamInterrupted, match="ended before the answer did") as caught:
        await texts(client)
    assert caught.value.request_id == ("chatcmpl-7" if pieces else "req-9")


async def test_a_connection_that_breaks_interrupts_the_stream(endpoint: FakeEndpoint, client: AsyncClient) -> None:
    endpoint.answer = streamed(event("a"), then=hang_up)
    got: list[Chunk] = []
    with pytest.raises(StreamInterrupted, match="broke"):
        async for chunk in client.stream("?"):
            got.append(chunk)
    assert [chunk.text for chunk in got] == ["a"]


async def test_a_connection_that_breaks_before_the_answer_is_an_interruption_too(
    endpoint: FakeEndpoint, client: AsyncClient
) -> None:
    async def answer(request: Any) -> Any:
        await hang_up(request)

    endpoint.answer = answer
    with pytest.raises(StreamInterrupted):
        await client.generate("?")


async def test_one_answer_of_two_is_not_enough(endpoint: FakeEndpoint, client: AsyncClient) -> None:
    endpoint.answer = streamed(event("a", finish="stop"), event("b", index=1))
    with pytest.raises(StreamInterrupted):
        await texts(client, n=2)


@pytest.mark.parametrize("data", [b"data: {]\n\n", b"data: [1]\n\n", b'data: {"choices": [{}]}\n\n', sse({})])
async def test_a_stream_of_something_else_is_interrupted(
    endpoint: FakeEndpoint, client: AsyncClient, data: bytes
) -> None:
    endpoint.answer = streamed(data, DONE)
    with pytest.raises(StreamInterrupted, match="not a chat completion"):
        await texts(client)


@pytest.mark.parametrize(
    ("code", "status", "kind"),
    [(500, 500, APIError), ("overloaded", 503, Overloaded), ("503", 503, Overloaded), (None, 500, APIError)],
)
async def test_an_error_in_the_stream_is_raised(
    endpoint: FakeEndpoint,
    client: AsyncClient,
    code: str | int | None,
    status: int,
    kind: type[APIError],
) -> None:
    endpoint.answer = streamed(event("a"), sse({"error": {"message": "lost", "code": code}}), DONE)
    with pytest.raises(kind, match="lost") as caught:
        await texts(client)
    assert caught.value.status == status
    assert caught.value.request_id == "chatcmpl-7"


async def test_closing_the_iterator_hangs_up_on_the_server(endpoint: FakeEndpoint, client: AsyncClient) -> None:
    endpoint.answer = streamed(event("a"), then=hang)
    async with aclosing(client.stream("?")) as chunks:
        assert (await anext(chunks)).text == "a"
        assert not endpoint.cancelled.is_set()
    assert await asyncio.to_thread(endpoint.cancelled.wait, 5)


async def test_leaving_the_loop_hangs_up_on_the_server(endpoint: FakeEndpoint, client: AsyncClient) -> None:
    endpoint.answer = streamed(event("a"), then=hang)
    async for _ in client.stream("?"):
        break
    assert await asyncio.to_thread(endpoint.cancelled.wait, 5)


async def test_cancelling_the_task_hangs_up_on_the_server(endpoint: FakeEndpoint, client: AsyncClient) -> None:
    endpoint.answer = streamed(event("a"), then=hang)
    first = asyncio.Event()

    async def read() -> None:
        async for _ in client.stream("?"):
            first.set()

    task = asyncio.create_task(read())
    await first.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(endpoint.cancelled.wait, 5)


async def test_a_finished_stream_leaves_its_connection_for_the_next_call(
    endpoint: FakeEndpoint, client: AsyncClient
) -> None:
    peers = set()

    async def answer(request: Any) -> Any:
        peers.add(request.transport.get_extra_info("peername"))
        return await streamed(event("a", finish="stop"), DONE)(request)

    endpoint.answer = answer
    for _ in range(3):
        assert await texts(client) == ["a"]
    assert len(peers) == 1


async def test_many_streams_run_at_once(endpoint: FakeEndpoint, client: AsyncClient) -> None:
    endpoint.answer = streamed(event("a"), event("b", finish="stop"), DONE)
    answers = await asyncio.gather(*(texts(client) for _ in range(150)))
    assert answers == [["a", "b"]] * 150


async def test_the_small_calls_answer(endpoint: FakeEndpoint, client: AsyncClient) -> None:
    assert await client.models() == ["tiny", "other"]
    assert await client.health()
    assert await client.ready()
    endpoint.is_ready = False
    assert not await client.ready()
    assert await client.request("chatcmpl-1/ü") == {"id": "chatcmpl-1/ü", "state": "finished"}
    assert await client.cancel("chatcmpl-1/ü") == 2
    with pytest.raises(NotFound):
        await client.cancel("another's")


async def test_a_client_is_used_between_open_and_close(endpoint: FakeEndpoint) -> None:
    client = AsyncClient(endpoint.url)
    with pytest.raises(RuntimeError, match="open the client first"):
        await client.models()
    async with client:
        with pytest.raises(RuntimeError, match="already open"):
            await client.__aenter__()
    await client.aclose()
    with pytest.raises(RuntimeError, match="closed"):
        await client.models()


@pytest.mark.parametrize("url", ["127.0.0.1:8400", "localhost:8400", "ftp://a", "http://", "http://a:99999", ""])
def test_a_base_url_without_scheme_or_host_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="http://host:port"):
        AsyncClient(url)

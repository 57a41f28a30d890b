from __future__ import annotations

import asyncio
import inspect
import pickle
import re
import socket
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from aiohttp import web
from fake_endpoint import DONE, ROLE, FakeEndpoint, error, event, hang, streamed

import epd.client
from epd.client import errors
from epd.client.errors import (
    APIError,
    AuthenticationError,
    BadRequest,
    ConnectFailed,
    ConnectTimeout,
    EPDError,
    FirstTokenTimeout,
    NotFound,
    Overloaded,
    ServerError,
    Timeout,
    TokenTimeout,
    TotalTimeout,
    TransportError,
)

AsyncClient, Timeouts = epd.client.AsyncClient, epd.client.Timeouts


def classes() -> dict[str, type[Exception]]:
    return {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception) and value.__module__ == errors.__name__
    }


def test_all_names_everything_public() -> None:
    assert set(errors.__all__) == set(classes())
    assert set(errors.__all__) < set(epd.client.__all__)
    public = {name for name, value in vars(epd.client).items() if not name.startswith("_")}
    submodules = {name for name in public if inspect.ismodule(getattr(epd.client, name))}
    assert set(epd.client.__all__) == public - submodules


def test_the_docstring_is_the_tree() -> None:
    parents: list[str] = []
    listed = {}
    for indent, name in re.findall(r"^( *)\* (\w+)", errors.__doc__ or "", re.MULTILINE):
        depth = len(indent) // 2
        del parents[depth:]
        listed[name] = parents[-1] if parents else "Exception"
        parents.append(name)
    assert listed == {name: kind.__bases__[0].__name__ for name, kind in classes().items()}


def answer_with(response: Any) -> Any:
    async def answer(request: web.Request) -> web.Response:
        assert isinstance(response, web.Response)
        return response

    return answer


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, BadRequest),
        (413, BadRequest),
        (422, BadRequest),
        (401, AuthenticationError),
        (403, AuthenticationError),
        (404, NotFound),
        (429, Overloaded),
        (503, Overloaded),
        (500, ServerError),
        (502, ServerError),
        (504, ServerError),
        (409, APIError),
        (307, APIError),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
async def test_each_status_has_its_error(
    endpoint: FakeEndpoint, client: epd.client.AsyncClient, status: int, kind: type[APIError], is_stream: bool
) -> None:
    endpoint.answer = answer_with(error(status, "because", "some_code", X_Request_Id="req-1", Retry_After="3"))
    with pytest.raises(APIError) as caught:
        await (anext(client.stream("?")) if is_stream else client.generate("?"))
    raised = caught.value
    assert type(raised) is kind
    assert (raised.status, raised.code, raised.message) == (status, "some_code", "because")
    assert raised.request_id == "req-1"
    assert raised.body["error"]["type"] == "some_type"
    assert str(raised) == f"because (status {status}, request req-1)"
    if isinstance(raised, Overloaded):
        assert raised.retry_after_s == 3


async def test_retry_after_may_be_a_date_or_missing_or_nonsense() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    past = format_datetime(datetime.now(UTC) - timedelta(seconds=100), usegmt=True)
    waits = []
    for value in (soon, past, "nonsense", None):
        headers = {} if value is None else {"Retry-After": value}
        raised = errors.error_from_answer(503, headers, b"")
        assert isinstance(raised, Overloaded)
        waits.append(raised.retry_after_s)
    assert waits[0] == pytest.approx(100, abs=5)
    assert waits[1:] == [0, None, None]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"<html>" + b"x" * 10_000, "<html>" + "x" * 294),
        (b"", "the server gave no reason"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b'{"object": "error", "message": "old vLLM", "code": 40001}', "old vLLM"),
        (b'{"error": "just text"}', "just text"),
        (b'{"error": {}}', "the server sent no message: {}"),
        (b"\xff\xfe", "��"),
    ],
)
def test_an_error_in_another_form_still_has_a_message(body: bytes, message: str) -> None:
    assert errors.error_from_answer(500, {}, body).message == message


@pytest.mark.parametrize("body", ["not JSON", '{"data": 1}', "[]", '{"choices": []}'])
async def test_an_answer_that_is_not_a_completion_is_an_api_error(
    endpoint: FakeEndpoint, client: epd.client.AsyncClient, body: str
) -> None:
    endpoint.answer = answer_with(web.Response(text=body))
    with pytest.raises(APIError, match="does not speak the OpenAI API"):
        await client.generate("?")


@pytest.mark.parametrize("kind", sorted(classes()))
def test_every_error_survives_pickling(kind: str) -> None:
    made: Any = classes()[kind]
    if issubclass(made, Overloaded):
        before = made(503, "c", "m", "r", {"a": 1}, 2.0)
    elif issubclass(made, APIError):
        before = made(500, "c", "m", "r", {"a": 1})
    elif issubclass(made, TransportError):
        before = made("m", request_id="r")
    else:
        before = made("m")
    after = pickle.loads(pickle.dumps(before))
    assert type(after) is made
    assert str(after) == str(before)
    assert vars(after) == vars(before)


async def test_a_refused_connection_says_where_and_why() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound but not listening
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        async with AsyncClient(url) as client:
            with pytest.raises(ConnectFailed) as caught:
                await client.generate("?")
    assert str(caught.value) == f"cannot connect to {url}: Connection refused"


async def test_an_unknown_host_is_a_failed_connection() -> None:
    async with AsyncClient("http://nowhere.invalid:1") as client:
        with pytest.raises(ConnectFailed, match=r"nowhere\.invalid"):
            await client.health()


async def test_a_server_that_does_not_speak_tls_is_a_failed_connection(endpoint: FakeEndpoint) -> None:
    async with AsyncClient(endpoint.url.replace("http:", "https:")) as client:
        with pytest.raises(ConnectFailed):
            await client.health()


async def test_a_connection_that_hangs_runs_into_connect_s() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:  # accepts in the kernel, never shakes hands
        url = f"https://127.0.0.1:{deaf.getsockname()[1]}"
        async with AsyncClient(url, timeouts=Timeouts(connect_s=0.1)) as client:
            with pytest.raises(ConnectTimeout, match=r"within 0\.1 s \(connect_s\)"):
                await client.generate("?")


@pytest.mark.parametrize("pieces", [(), (ROLE,), (ROLE, b": alive\n\n" * 3)])
async def test_a_stream_without_a_token_runs_into_first_token_s(
    endpoint: FakeEndpoint, pieces: tuple[bytes, ...]
) -> None:
    endpoint.answer = streamed(*pieces, then=hang)
    async with AsyncClient(endpoint.url, timeouts=Timeouts(first_token_s=0.2)) as client:
        with pytest.raises(FirstTokenTimeout, match="first_token_s"):
            await anext(client.stream("?"))
        assert await asyncio.to_thread(endpoint.cancelled.wait, 5)


async def test_headers_that_never_come_run_into_first_token_s(endpoint: FakeEndpoint) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        await hang(request)
        raise AssertionError

    endpoint.answer = answer
    async with AsyncClient(endpoint.url, timeouts=Timeouts(first_token_s=0.1)) as client:
        with pytest.raises(FirstTokenTimeout):
            await anext(client.stream("?"))


async def test_a_gap_between_tokens_runs_into_token_s_whatever_comments_come(endpoint: FakeEndpoint) -> None:
    async def keep_alive(request: web.Request) -> None:
        assert request.transport is not None
        while True:
            request.transport.write(b"9\r\n: alive\n\n\r\n")
            await asyncio.sleep(0.02)

    endpoint.answer = streamed(event("a"), then=keep_alive)
    async with AsyncClient(endpoint.url, timeouts=Timeouts(token_s=0.2)) as client:
        chunks = client.stream("?")
        assert (await anext(chunks)).text == "a"
        with pytest.raises(TokenTimeout, match="token_s") as caught:
            await anext(chunks)
        assert caught.value.request_id == "chatcmpl-7"
        assert await asyncio.to_thread(endpoint.cancelled.wait, 5)


async def test_the_callers_own_time_between_chunks_does_not_count(endpoint: FakeEndpoint) -> None:
    endpoint.answer = streamed(event("a"), event("b", finish="stop"), DONE)
    async with AsyncClient(endpoint.url, timeouts=Timeouts(token_s=0.1)) as client:
        seen = []
        async for chunk in client.stream("?"):
            seen.append(chunk.text)
            await asyncio.sleep(0.15)
    assert seen == ["a", "b"]


async def test_a_stream_that_never_ends_runs_into_total_s(endpoint: FakeEndpoint) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(event("a"))
            await asyncio.sleep(0.01)

    endpoint.answer = answer
    async with AsyncClient(endpoint.url, timeouts=Timeouts(total_s=0.3)) as client:
        with pytest.raises(TotalTimeout, match="total_s"):
            async for _ in client.stream("?"):
                pass
        assert await asyncio.to_thread(endpoint.cancelled.wait, 5)


async def test_an_answer_that_never_comes_runs_into_total_s(endpoint: FakeEndpoint) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        await hang(request)
        raise AssertionError

    endpoint.answer = answer
    async with AsyncClient(endpoint.url, timeouts=Timeouts(total_s=0.1)) as client:
        with pytest.raises(TotalTimeout):
            await client.generate("?")
        assert await asyncio.to_thread(endpoint.cancelled.wait, 5)


async def test_half_an_answer_runs_into_total_s(endpoint: FakeEndpoint) -> None:
    endpoint.answer = streamed(b"{", then=hang)
    async with AsyncClient(endpoint.url, timeouts=Timeouts(total_s=0.2)) as client:
        with pytest.raises(TotalTimeout) as caught:
            await client.generate("?")
        assert caught.value.request_id == "req-9"


async def test_a_small_call_waits_no_longer_than_token_s() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        async with AsyncClient(url, timeouts=Timeouts(token_s=0.1)) as client:
            with pytest.raises(TotalTimeout, match=r"0\.1 s"):
                await client.health()


def test_timeouts_are_also_the_builtin_one() -> None:
    assert issubclass(Timeout, TimeoutError)
    assert issubclass(Timeout, EPDError)


@pytest.mark.parametrize("name", ["connect_s", "first_token_s", "token_s", "total_s"])
@pytest.mark.parametrize("value", [0, -1, None, float("inf"), float("nan"), "5"])
def test_a_clock_cannot_be_switched_off(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        Timeouts(**{name: value})

from __future__ import annotations

import asyncio
import gc
import inspect
import threading
from contextlib import closing
from typing import Any

import pytest
from fake_endpoint import DONE, FakeEndpoint, complete, event, hang, streamed

from epd.client import AsyncClient, Client, NotFound, StreamInterrupted, Timeouts, TokenTimeout

AB = streamed(event("a"), event("b", finish="stop"), DONE)


def client_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "epd-client"]


def test_the_surface_is_that_of_the_asynchronous_client() -> None:
    def methods(kind: type) -> dict[str, inspect.Signature]:
        public = {name: value for name, value in vars(kind).items() if not name.startswith("_")}
        return {
            name: inspect.signature(value)
            for name, value in public.items()
            if inspect.isfunction(value) and name not in ("close", "aclose")
        }

    assert methods(Client) == methods(AsyncClient)
    assert inspect.signature(Client) == inspect.signature(AsyncClient)
    assert Client.generate.__doc__ == AsyncClient.generate.__doc__


def test_every_call_works_in_a_plain_thread(endpoint: FakeEndpoint) -> None:
    with Client(endpoint.url) as client:
        assert client.generate("?").text == "hello"
        assert client.models() == ["tiny", "other"]
        assert client.health()
        assert client.ready()
        with pytest.raises(NotFound):
            client.request("unknown")
        assert client.cancel("chatcmpl-1/ü") == 2
        endpoint.answer = complete("a", "b")
        assert client.generate("?", n=2).texts == ("a", "b")
        endpoint.answer = AB
        assert [chunk.text for chunk in client.stream("?")] == ["a", "b"]
    assert client_threads() == []


async def test_every_call_works_while_an_event_loop_is_running(endpoint: FakeEndpoint) -> None:
    assert asyncio.get_running_loop().is_running()
    with Client(endpoint.url) as client:
        assert client.generate("?").text == "hello"
        endpoint.answer = AB
        assert [chunk.text for chunk in client.stream("?")] == ["a", "b"]


async def test_threads_may_share_a_client(endpoint: FakeEndpoint) -> None:
    endpoint.answer = AB

    def read() -> list[str]:
        return [chunk.text for chunk in client.stream("?")]

    with Client(endpoint.url) as client:
        answers = await asyncio.gather(*(asyncio.to_thread(read) for _ in range(8)))
    assert answers == [["a", "b"]] * 8


def test_a_stream_is_lazy_enough_to_see_chunks_as_they_come(endpoint: FakeEndpoint) -> None:
    endpoint.answer = streamed(event("a"), then=hang)
    with Client(endpoint.url) as client:
        chunks = client.stream("?")
        assert next(chunks).text == "a"
        assert not endpoint.cancelled.is_set()
        chunks.close()
        assert endpoint.cancelled.wait(5)


def test_leaving_the_loop_hangs_up_on_the_server(endpoint: FakeEndpoint) -> None:
    endpoint.answer = streamed(event("a"), then=hang)
    with Client(endpoint.url) as client:
        for _ in client.stream("?"):
            break
        gc.collect()
        assert endpoint.cancelled.wait(5)


@pytest.mark.parametrize("place", ["concurrent.futures.Future.result", "asyncio.run_coroutine_threadsafe"])
def test_a_wait_that_is_broken_off_hangs_up_on_the_server(
    endpoint: FakeEndpoint, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    endpoint.answer = streamed(event("a"), then=hang)
    submit = asyncio.run_coroutine_threadsafe

    def interrupt(*arguments: Any) -> None:
        monkeypatch.undo()
        if "run_coroutine" in place:
            submit(*arguments)  # the work has begun, and the caller does not even know
        raise KeyboardInterrupt

    with Client(endpoint.url) as client, closing(client.stream("?")) as chunks:
        next(chunks)
        monkeypatch.setattr(place, interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(chunks)
        assert endpoint.cancelled.wait(5)
        assert list(chunks) == []


def test_errors_come_through(endpoint: FakeEndpoint) -> None:
    endpoint.answer = streamed(event("a"), then=hang)
    with Client(endpoint.url, timeouts=Timeouts(token_s=0.1)) as client, pytest.raises(TokenTimeout):
        list(client.stream("?"))


def test_closing_fails_the_calls_in_progress(endpoint: FakeEndpoint) -> None:
    endpoint.answer = streamed(event("a"), then=hang)
    client = Client(endpoint.url)
    failures: list[BaseException] = []
    started = threading.Event()

    def read() -> None:
        try:
            for _ in client.stream("?"):
                started.set()
        except StreamInterrupted as error:
            failures.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    assert started.wait(5)
    client.close()
    thread.join(5)
    assert len(failures) == 1
    assert endpoint.cancelled.wait(5)


def test_a_stream_that_outlives_its_client_can_still_be_closed(endpoint: FakeEndpoint) -> None:
    endpoint.answer = streamed(event("a"), then=hang)
    client = Client(endpoint.url)
    chunks = client.stream("?")
    next(chunks)
    client.close()
    chunks.close()
    assert endpoint.cancelled.wait(5)


def test_a_closed_client_says_so_and_may_be_closed_again(endpoint: FakeEndpoint) -> None:
    client = Client(endpoint.url)
    client.close()
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.models()
    with pytest.raises(RuntimeError, match="closed"):
        next(client.stream("?"))


def test_constructing_starts_nothing_and_forgetting_ends_the_thread(endpoint: FakeEndpoint) -> None:
    client = Client(endpoint.url)
    assert client_threads() == []
    client.health()
    [thread] = client_threads()
    del client
    gc.collect()
    thread.join(5)
    assert not thread.is_alive()

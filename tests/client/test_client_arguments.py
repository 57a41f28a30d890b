"""What the client takes: nothing is ignored or read twice, and what is wrong is said before anything is sent."""

from __future__ import annotations

import asyncio
import io
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_endpoint import DONE, FakeEndpoint, complete, event, streamed
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from epd.client import AsyncClient, Client, EPDError, PictureError
from epd.client.chat import Chat

CHAT = [{"role": "user", "content": "!"}]


def png(color: int = 1) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (3, 2), (color, 2, 3)).save(file, "PNG")
    return file.getvalue()


def folder_of(tmp_path: Path) -> Path:
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png(number))
    return tmp_path


MANY: dict[str, Callable[[Path], Any]] = {
    "list": lambda folder: sorted(folder.glob("*.png")),
    "tuple": lambda folder: tuple(sorted(folder.glob("*.png"))),
    "generator": lambda folder: (folder / f"{number}.png" for number in range(3)),
    "map": lambda folder: map(Path.read_bytes, sorted(folder.glob("*.png"))),
    "sorted glob": lambda folder: iter(sorted(folder.glob("*.png"))),
    "dictionary's values": lambda folder: {path.name: path for path in sorted(folder.glob("*.png"))}.values(),
    "array of names": lambda folder: np.array([str(path) for path in sorted(folder.glob("*.png"))]),
    "open files": lambda folder: [path.open("rb") for path in sorted(folder.glob("*.png"))],
}


@pytest.mark.parametrize("reuse", [True, False])
@pytest.mark.parametrize("make", MANY.values(), ids=MANY)
def test_every_iterable_of_pictures_is_sent_whole_and_in_order(
    endpoint: FakeEndpoint, tmp_path: Path, make: Callable[[Path], Any], reuse: bool
) -> None:
    folder_of(tmp_path)
    expected = [{"type": "image_url", "image_url": {"url": url_of(png(number))}} for number in range(3)]
    with Client(endpoint.url, reuse_pictures=reuse) as client:
        client.generate("?", images=make(tmp_path))
    with Client(endpoint.url, reuse_pictures=reuse) as client:
        endpoint.answer = streamed(event("a", finish="stop"), DONE)
        list(client.stream("?", images=make(tmp_path)))
    for body in endpoint.bodies:
        assert body["messages"][0]["content"] == [*expected, {"type": "text", "text": "?"}]


def url_of(content: bytes) -> str:
    chat = Chat("?", {"images": [content]})
    chat.load()
    [picture] = chat.pictures
    return picture.url()


@pytest.mark.parametrize("wrong", [7, 1.5, object(), {"a": "b.png"}, {"type": "image_url"}, True, lambda: ["a.png"]])
async def test_what_holds_no_pictures_is_a_type_error_that_says_what_is_taken(
    endpoint: FakeEndpoint, client: AsyncClient, wrong: Any
) -> None:
    with pytest.raises(TypeError, match=r"images takes a path, a URL, bytes.*or an iterable of them, not "):
        await client.generate("?", images=wrong)
    with pytest.raises(TypeError, match="images takes"):
        client.stream("?", images=wrong)
    assert endpoint.bodies == []


@pytest.mark.parametrize("nothing", [None, (), [], iter(()), np.array([])])
async def test_an_empty_list_of_pictures_sends_none(endpoint: FakeEndpoint, client: AsyncClient, nothing: Any) -> None:
    if isinstance(nothing, np.ndarray):
        with pytest.raises(PictureError):
            await client.generate("?", images=nothing)
    else:
        await client.generate("?", images=nothing)
        assert endpoint.bodies[0]["messages"] == [{"role": "user", "content": "?"}]


def test_iterables_are_read_where_the_method_is_called(endpoint: FakeEndpoint) -> None:
    """One may belong to its thread, as a cursor of sqlite does, take its time, or use this very client."""
    threads: list[threading.Thread] = []

    def pictures() -> Iterator[bytes]:
        threads.append(threading.current_thread())
        client.generate("Which one?")
        yield png()

    endpoint.answer = streamed(event("a", finish="stop"), DONE)
    with Client(endpoint.url) as client:
        chunks = client.stream("?", images=(png(number) for number in [1]))
        assert endpoint.bodies == [], "nothing is sent before the first step"
        assert len(list(chunks)) == 1
    endpoint.answer = complete("a")
    with Client(endpoint.url) as client:
        client.generate("?", images=pictures())
    assert threads == [threading.current_thread()]
    assert [type(body["messages"][0]["content"]) for body in endpoint.bodies] == [list, str, list]


async def test_what_an_iterable_raises_is_the_callers(client: AsyncClient) -> None:
    def broken() -> Iterator[bytes]:
        yield png()
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        await client.generate("?", images=broken())


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("image", "images"),
        ("picture", "images"),
        ("pictures", "images"),
        ("video", "videos"),
        ("audio", "audios"),
        ("max_token", "max_tokens"),
        ("max_new_tokens", "max_tokens"),
        ("Temperature", "temperature"),
        ("top-p", "top_p"),
        ("stop_tokens", "stop_token_ids"),
        ("message", "messages"),
        ("extra", "extra_body"),
        ("response_formats", "response_format"),
    ],
)
@pytest.mark.parametrize("method", ["generate", "stream"])
async def test_an_unknown_argument_is_refused_with_the_nearest_right_word(
    endpoint: FakeEndpoint, client: AsyncClient, name: str, meant: str, method: str
) -> None:
    arguments: Any = {name: [png()]}
    with pytest.raises(TypeError, match=rf"there is no argument '{name}': did you mean '{meant}'\?"):
        getattr(client, method)("?", **arguments)
    with Client(endpoint.url) as blocking, pytest.raises(TypeError, match=f"'{meant}'"):
        getattr(blocking, method)("?", **arguments)
    assert endpoint.bodies == []


async def test_an_argument_like_no_other_is_refused_with_the_way_to_send_it(client: AsyncClient) -> None:
    arguments: Any = {"zzz": 1}
    with pytest.raises(TypeError, match=r"no argument 'zzz': What only the server knows goes into extra_body"):
        await client.generate("?", **arguments)
    arguments = {"stream": True}
    with pytest.raises(TypeError, match=r"call the method stream\(\)"):
        await client.generate("?", **arguments)
    unknown: Any = {"salt": "a"}
    with pytest.raises(TypeError):
        await client.upload(png(), **unknown)


async def test_extra_body_is_for_what_the_server_may_know(endpoint: FakeEndpoint, client: AsyncClient) -> None:
    await client.generate("?", max_tokens=3, extra_body={"new_field": [1], "top_k": 7, "nothing": None})
    body = endpoint.bodies[0]
    assert (body["new_field"], body["top_k"], body["nothing"], body["max_tokens"]) == ([1], 7, None, 3)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"images": ["a.png"]}, "cannot have 'images'"),
        ({"messages": CHAT}, "cannot have 'messages'"),
        ({"stream": True}, "cannot have 'stream'"),
        ({"prompt": "?"}, "cannot have 'prompt'"),
        ({"extra_body": {}}, "cannot have 'extra_body'"),
        ({"max_tokens": 5}, "'max_tokens' is given twice"),
        ({"model": "other"}, "'model' is given twice"),
        ({"top_logprobs": 2}, "'top_logprobs' is given twice"),
        ([("a", 1)], "not list"),
    ],
)
async def test_an_extra_body_that_would_be_dropped_or_contradicts_is_refused(
    endpoint: FakeEndpoint, client: AsyncClient, extra: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        await client.generate("?", max_tokens=3, model="m", logprobs=4, extra_body=extra)
    assert endpoint.bodies == []


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"prompt": "?", "messages": CHAT}, TypeError, "not both"),
        ({"prompt": "", "messages": CHAT}, TypeError, "not both"),
        ({"prompt": ["?"]}, TypeError, "must be text"),
        ({"prompt": b"?"}, TypeError, "must be text"),
        ({}, TypeError, "a prompt or messages"),
        ({"messages": CHAT, "images": "a.png"}, ValueError, "content parts"),
        ({"messages": CHAT, "videos": iter(["a.mp4"])}, ValueError, "content parts"),
        ({"messages": CHAT[0]}, TypeError, "an iterable of messages"),
        ({"messages": "hello"}, TypeError, "an iterable of messages"),
        ({"messages": ["hello"]}, TypeError, "an iterable of messages"),
        ({"messages": []}, TypeError, "an iterable of messages"),
        ({"messages": iter(())}, TypeError, "an iterable of messages"),
        ({"messages": 7}, TypeError, "an iterable of messages"),
        ({"prompt": "?", "logprobs": 4, "top_logprobs": 5}, TypeError, "not both"),
        ({"prompt": "?", "temperature": float("nan")}, ValueError, "temperature is nan"),
        ({"prompt": "?", "extra_body": {"a": {"b": float("inf")}}}, ValueError, "b is inf"),
        ({"prompt": "?", "tools": [object()]}, TypeError, "object cannot be sent as JSON"),
        ({"prompt": "\udc80"}, ValueError, "cannot be sent as UTF-8"),
    ],
)
async def test_contradictions_and_what_cannot_be_sent_are_refused(
    endpoint: FakeEndpoint, client: AsyncClient, arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        await client.generate(**arguments)
    assert endpoint.bodies == []


async def test_what_contains_itself_is_refused(client: AsyncClient) -> None:
    itself: dict[str, Any] = {}
    itself["a"] = [itself]
    with pytest.raises(ValueError, match="nested too deeply"):
        await client.generate("?", vllm_xargs={"a": [itself]})


async def test_messages_and_their_content_may_be_any_iterables(endpoint: FakeEndpoint, client: AsyncClient) -> None:
    for _ in range(2):
        content = ({"type": "image", "image": each} for each in [png(), "http://a/b.png"])
        await client.generate(messages=({"role": "user", "content": content} for _ in range(1)))
    assert [[part["type"] for part in body["messages"][0]["content"]] for body in endpoint.bodies] == [
        ["image_url", "image_url"]
    ] * 2
    assert endpoint.uploads == [(png(), "")], "what comes again in them is uploaded"


async def test_the_same_picture_twice_in_a_call_is_sent_twice(endpoint: FakeEndpoint, client: AsyncClient) -> None:
    for _ in range(2):
        await client.generate("?", images=[png(), png(), png(9)])
    kinds = [[part["image_url"]["url"][:5] for part in body["messages"][0]["content"][:3]] for body in endpoint.bodies]
    assert kinds == [["data:"] * 3, ["epd-m"] * 3]
    assert len({part["image_url"]["url"] for part in endpoint.bodies[1]["messages"][0]["content"][:3]}) == 2


async def test_a_file_is_read_once_for_a_call(
    endpoint: FakeEndpoint, client: AsyncClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is summed is what is uploaded: a file that changes between the two would be taken for what it was."""
    path = folder_of(tmp_path) / "0.png"
    reads = []
    read = Path.read_bytes

    def counted(self: Path) -> bytes:
        reads.append(self)
        return read(self)

    monkeypatch.setattr(Path, "read_bytes", counted)
    for _ in range(3):
        await client.generate("?", images=[path])
    assert len(reads) == 3 and len(endpoint.uploads) == 1


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=5)
    | st.just(Decimal("1.5"))
    | st.just(1j)
    | st.sampled_from([png(), "data:image/png;base64,AAAA", object(), {1, 2}, Image.new("L", (2, 2))]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
part = st.fixed_dictionaries(
    {"type": st.sampled_from(["image", "video", "audio", "image_url", "audio_url", "text", "x"])},
    optional={name: anything for name in ("image", "video", "image_url", "audio_url", "text")},
)
message = st.fixed_dictionaries({"role": st.just("user")}, optional={"content": anything | st.lists(part)})


@settings(deadline=None, max_examples=300)
@given(
    prompt=st.none() | st.text(max_size=5) | anything,
    arguments=st.fixed_dictionaries(
        {},
        optional={
            "images": anything,
            "videos": anything,
            "audios": anything,
            "messages": anything | st.lists(message, max_size=2),
            "system": anything,
            "logprobs": anything,
            "extra_body": anything,
            "n": anything,
            "cache_salt": anything,
            "wrong": anything,
        },
    ),
)
def test_whatever_is_given_only_documented_errors_come(prompt: Any, arguments: dict[str, Any]) -> None:
    try:
        chat = Chat(prompt, arguments)
        chat.load()
        assert isinstance(chat.body(), bytes)
    except (EPDError, TypeError, ValueError) as error:
        assert str(error)


async def test_an_array_that_changes_during_a_call_is_sent_as_it_was(
    endpoint: FakeEndpoint, client: AsyncClient
) -> None:
    array = np.full((4, 4, 3), 9, np.uint8)
    for _ in range(2):
        await asyncio.gather(client.generate("?", images=[array.copy()]), client.generate("?", images=array))
    assert len(endpoint.uploads) == 1
    array[:] = 10
    await client.generate("?", images=array)
    assert endpoint.bodies[-1]["messages"][0]["content"][0]["image_url"]["url"].startswith("data:")


WITHOUT_NUMPY = """
import sys
sys.modules["numpy"] = None  # importing it raises
from PIL import Image
from epd.client import Client
from epd.client.chat import Chat
chat = Chat("?", {"images": [Image.new(mode, (4, 4)) for mode in ("RGB", "P", "I", "F", "I;16", "CMYK")]})
chat.load()
chat.body()
print(len({picture.digest for picture in chat.pictures}))
"""


def test_the_client_works_without_numpy() -> None:
    result = subprocess.run([sys.executable, "-c", WITHOUT_NUMPY], capture_output=True, text=True, timeout=60)
    assert (result.stdout, result.stderr) == ("4\n", ""), "I, F and I;16 of zeros are all L"

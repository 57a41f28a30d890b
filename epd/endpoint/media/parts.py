"""Where the media are in a request's JSON: the places and the content parts that vLLM reads them from, and no others.

Lives in the endpoint process; pure, no vLLM. What is listed here is allowed; a content part of any other type is
refused before anything of its request is opened. `tests/endpoint/test_parts.py` compares the tables with vLLM's
parser (0.32: `vllm.renderers.chat_utils`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from epd.endpoint.http.refusals import RefusedError
from epd.errors import ErrorCode

MAX_DEPTH = 64

# The types of content parts that have a medium, and its kind; the address is under the type's name, except for this
# one.
MEDIA = {
    "image_url": "image",
    "input_image": "image",
    "video_url": "video",
    "audio_url": "audio",
    "input_audio": "audio",
}
_KEYS = {"input_image": "image_url"}
# Types without: in chats, in Responses, and in Anthropic's messages, whose pictures are in a `source`.
TEXT = frozenset({"text", "thinking", "refusal", "tool_reference"})
_TEXT_OF_RESPONSES = frozenset({"input_text", "output_text", "reasoning_text", "summary_text"})
_BLOCKS = frozenset({"image", "tool_use", "tool_result", "redacted_thinking", "tool_addition", "tool_removal"})
KNOWN = frozenset(MEDIA) | TEXT | _TEXT_OF_RESPONSES | _BLOCKS
# What else vLLM's parser would accept: tensors, and what only a program can pass.
REFUSED = frozenset({"image_pil", "image_embeds", "audio_embeds", "video_embeds", "prompt_embeds"})
# A part without a type, or with a `uuid`, is what the first of these keys that it has says.
BY_KEY = (
    "image_url",
    "image_pil",
    "image_embeds",
    "audio_embeds",
    "video_embeds",
    "prompt_embeds",
    "audio_url",
    "input_audio",
    "video_url",
    "tool_reference",
)
# Fields with lists of addresses, and where they are.
FIELDS = {"/v1/systemone": {"images": "image", "audio": "audio", "videos": "video"}}


def media_in(body: dict[str, Any], path: str) -> Iterator[tuple[str, str]]:
    """The (kind, address) of each picture, video and sound in a body, in any of the APIs' shapes.

    `kind` is "image", "video" or "audio". `input_audio` and Anthropic's base64 sources come out as data URLs.

    Raises:
        RefusedError: it is nested too deeply, or has a content part of a type that is not known here.
    """
    for name in ("messages", "system", "input"):
        _check_depth(body.get(name))
    yield from _parts(body.get("system"))
    yield from _messages(body.get("messages"))
    yield from _messages(body.get("input"))
    for field, kind in FIELDS.get(path, {}).items():
        addresses = body.get(field)
        yield from (
            ((kind, each) for each in addresses or () if isinstance(each, str)) if isinstance(addresses, list) else ()
        )


def _check_depth(tree: Any) -> None:
    stack = [(tree, 0)]
    while stack:
        node, depth = stack.pop()
        if depth > MAX_DEPTH:
            raise RefusedError(ErrorCode.INVALID_JSON, f"messages are nested deeper than {MAX_DEPTH}")
        inner = node if isinstance(node, list) else node.values() if isinstance(node, dict) else ()
        stack.extend((each, depth + 1) for each in inner if isinstance(each, dict | list))


def _messages(messages: Any) -> Iterator[tuple[str, str]]:
    """The media of a list of messages, of lists of them (a batch), or of the items of Responses."""
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, list):
            yield from _messages(message)
        elif isinstance(message, dict):
            yield from _parts(message.get("content"))
            if message.get("role") is None:  # a tool's output, in Responses
                yield from _parts(message.get("output"))


def _parts(content: Any) -> Iterator[tuple[str, str]]:
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict):
            yield from _media_of(part)


def _media_of(part: dict[str, Any]) -> Iterator[tuple[str, str]]:
    kind = part.get("type")
    if kind is None or part.get("uuid") is not None:
        kind = next((key for key in BY_KEY if key in part), kind)
    if not isinstance(kind, str):
        return  # vLLM will say that it needs one
    if kind in REFUSED or kind not in KNOWN:
        text = f"content parts of type {kind[:64]!r} are not supported; {', '.join(MEDIA)} and text are"
        raise RefusedError(ErrorCode.UNSUPPORTED, text)
    if kind in MEDIA:
        address = _address(kind, part.get(_KEYS.get(kind, kind)))
        if address is not None:
            yield MEDIA[kind], address
    elif kind == "image":
        yield from _source(part.get("source"))
    elif kind == "tool_result":
        yield from _parts(part.get("content"))


def _address(kind: str, value: Any) -> str | None:
    if kind == "input_audio":
        data = value.get("data") if isinstance(value, dict) else None
        # As vLLM composes it.
        return f"data:audio/{value.get('format', '')};base64,{data}" if isinstance(data, str) and data else None
    address = value.get("url") if isinstance(value, dict) else value
    return address if isinstance(address, str) else None


def _source(source: Any) -> Iterator[tuple[str, str]]:
    if not isinstance(source, dict):
        return
    if source.get("type") == "url":
        if isinstance(source.get("url"), str):
            yield "image", source["url"]
    elif isinstance(source.get("data"), str):
        yield "image", f"data:{source.get('media_type', 'image/jpeg')};base64,{source['data']}"

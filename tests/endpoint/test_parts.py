"""Where media are looked for in a body: where vLLM's parser has them, and nowhere else."""

import pytest

from epd.endpoint.http.refusals import RefusedError
from epd.endpoint.media import parts
from epd.endpoint.media.parts import media_in

URL = "https://a.example/x"
# Each type of part with a medium, in the ways that vLLM's parser reads it.
SPELLINGS = [
    ({"type": "image_url", "image_url": {"url": URL}}, ("image", URL)),
    ({"type": "input_image", "image_url": URL}, ("image", URL)),
    ({"type": "video_url", "video_url": {"url": URL}}, ("video", URL)),
    ({"type": "audio_url", "audio_url": {"url": URL}}, ("audio", URL)),
    ({"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}}, ("audio", "data:audio/wav;base64,AA")),
    ({"image_url": URL}, ("image", URL)),
    ({"image_url": {"url": URL}}, ("image", URL)),
    ({"video_url": URL}, ("video", URL)),
    ({"audio_url": {"url": URL}}, ("audio", URL)),
    ({"type": "text", "uuid": "x", "image_url": URL}, ("image", URL)),
    ({"type": "x", "uuid": "x", "video_url": URL}, ("video", URL)),
    ({"uuid": 0, "type": "text", "text": "x", "audio_url": URL}, ("audio", URL)),
    ({"type": "image", "source": {"type": "url", "url": URL}}, ("image", URL)),
    ({"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA"}},
     ("image", "data:image/png;base64,AA")),
    ({"type": "image", "source": {"data": "AA"}}, ("image", "data:image/jpeg;base64,AA")),
    ({"type": "tool_result", "content": [{"type": "image", "source": {"type": "url", "url": URL}}]}, ("image", URL)),
]  # fmt: skip
PLACES = {
    "chat": lambda part: {"messages": [{"role": "user", "content": [part]}]},
    "batch": lambda part: {"messages": [[{"role": "user", "content": [part]}]]},
    "system": lambda part: {"system": [part], "messages": []},
    "responses": lambda part: {"input": [{"role": "user", "content": [part]}]},
    "output of a tool": lambda part: {"input": [{"type": "function_call_output", "output": [part]}]},
}


def found(body, path="/v1/chat/completions"):
    return list(media_in(body, path))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("part", range(len(SPELLINGS)))
def test_media_are_found_in_every_place_and_spelling(place, part):
    content, medium = SPELLINGS[part]
    assert found(PLACES[place](content)) == [medium]


ARGUMENTS = [{"image_url": URL}, {"video_url": "s3://x"}, {"image_pil": "x"}, {"messages": [{"image_url": URL}]}]


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_the_same_key_in_another_place_is_not_a_medium(arguments):
    blocks = [
        {"type": "tool_use", "id": "t", "name": "f", "input": arguments},
        {"type": "text", "text": "x"} | arguments,
        {"type": "thinking", "thinking": "x"} | arguments,
        {"type": "tool_result", "content": "x", "input": arguments},
    ]
    body = {
        "messages": [{"role": "user", "content": blocks, "metadata": arguments}],
        "input": [{"type": "function_call", "arguments": arguments}, {"role": "user", "content": "x"}],
        "tools": [{"function": {"parameters": {"properties": arguments}}}],
        "metadata": arguments,
        "chat_template_kwargs": arguments,
    }
    assert found(body) == []


@pytest.mark.parametrize("kind", sorted(parts.REFUSED))
@pytest.mark.parametrize("spelling", ["type", "key", "uuid"])
@pytest.mark.parametrize("place", PLACES)
def test_what_vllm_would_take_beside_is_refused(place, spelling, kind):
    part = {"type": {"type": kind}, "key": {}, "uuid": {"type": "text", "uuid": "x"}}[spelling] | {kind: URL}
    with pytest.raises(RefusedError, match=kind):
        found(PLACES[place](part))


@pytest.mark.parametrize("kind", ["image_file", "input_file", "document", "nonsense", ""])
def test_a_type_that_is_not_known_is_refused_by_its_name(kind):
    with pytest.raises(RefusedError, match=f"'{kind}'"):
        found({"messages": [{"content": [{"type": kind, "image_url": URL}]}]})


ODD = [
    *(1, None, {"type": 1}, {"type": None}, {"type": "image_url", "image_url": 1}, {"type": "image", "source": 1}),
    *({"type": "tool_result", "content": "x"}, {"type": "input_audio"}, {"type": "input_image", "file_id": "x"}),
]


@pytest.mark.parametrize(
    "body",
    [
        *({"messages": 1}, {"messages": [1, None, "x"]}, {"input": {"content": []}}, {"system": {}}),
        {"messages": [{"content": ODD}], "input": [{"content": ODD}]},
    ],
    ids=str,
)
def test_what_has_another_shape_is_left_to_vllm(body):
    assert found(body) == []


def test_fields_with_lists_of_addresses_are_read_where_vllm_has_them():
    body = {"images": [URL, 1], "audio": [URL], "videos": None}
    assert found(body, "/v1/systemone") == [("image", URL), ("audio", URL)]
    assert found(body) == []


def test_messages_that_are_nested_without_end_are_refused():
    tree = []
    for _ in range(parts.MAX_DEPTH + 2):
        tree = [tree]
    for name in ("messages", "input", "system"):
        with pytest.raises(RefusedError, match="nested"):
            found({name: tree})


@pytest.mark.engine
def test_the_tables_have_all_types_that_vllms_parser_knows():
    from vllm.renderers import chat_utils

    assert set(chat_utils.MM_PARSER_MAP) == {
        *parts.MEDIA, *parts.REFUSED, *parts.TEXT, "input_text", "output_text"
    }, "a new type of content part: say in epd/endpoint/media/parts.py what it is"  # fmt: skip
    assert set(chat_utils.TEXT_PART_TYPES) <= parts.KNOWN - set(parts.MEDIA)


@pytest.mark.engine
def test_the_keys_of_parts_without_a_type_are_those_of_vllms_parser_in_its_order():
    import inspect
    import re

    from vllm.renderers import chat_utils

    source = inspect.getsource(chat_utils._parse_chat_message_content_mm_part)
    assert tuple(re.findall(r'if "(\w+)" in part:', source)) == parts.BY_KEY


@pytest.mark.engine
def test_the_blocks_of_anthropics_messages_are_known():
    import typing

    from vllm.entrypoints.anthropic.protocol import AnthropicContentBlock

    kinds = typing.get_args(AnthropicContentBlock.model_fields["type"].annotation)
    assert set(kinds) <= parts.KNOWN


@pytest.mark.engine
def test_every_way_of_the_connector_is_ours():
    from vllm.multimodal.media import MediaConnector

    from epd.endpoint.media.connector import LimitedConnector

    ways = {
        name for name in dir(MediaConnector) if not name.startswith("_") and callable(getattr(MediaConnector, name))
    }
    assert ways <= set(vars(LimitedConnector)), "a new way to media: bound or refuse it"

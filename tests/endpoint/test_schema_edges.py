"""Bad input at the edges of HTTP and JSON: headers, encodings, free-form fields, and strings that are no text.

As `test_schema.py`, whose endpoint, bodies and bounds these are.
"""

import contextlib
import gzip
import http.client
import json
import zlib

import hypothesis.strategies as st
import pytest
import requests
from hypothesis import given

from .test_schema import BODIES, JSON, NUM_EXAMPLES, OPERATIONS, TIMEOUT_S, check, fuzz, send, url

pytestmark = [pytest.mark.engine, pytest.mark.timeout(3600)]
__all__ = ["url"]  # the fixture

# fmt: off
FREE_FORM = [
    "vllm_xargs", "mm_processor_kwargs", "chat_template_kwargs", "metadata", "media_io_kwargs", "kv_transfer_params",
    "ec_transfer_params", "logit_bias", "extra_body", "response_format", "structured_outputs", "stream_options",
    "reasoning", "thinking", "documents", "tools", "text", "prompt", "context_management", "output_config",
]
# fmt: on


@pytest.mark.parametrize("place", BODIES)
def test_any_nested_objects_under_free_form_fields_are_answered(url, place):
    words = st.sampled_from(
        ["size", "longest_edge", "max_image_size", "num_crops", "image", "video", "fps", "num_frames", "image_mode",
         "enable_thinking", "messages", "type", "json_schema", "schema", "properties", "x", "", "\ud800", "__class__"]
    )  # fmt: skip
    inner = st.dictionaries(words | st.text(max_size=8), JSON | st.dictionaries(words, JSON, max_size=3), max_size=4)

    @fuzz
    @given(field=st.sampled_from(FREE_FORM), value=inner, depth=st.integers(0, 100))
    def run(field, value, depth):
        for _ in range(depth if depth > 95 else depth % 4):
            value = {"x": value}
        body = BODIES[place] | {field: value}
        send(url, place.partition("#")[0], json.dumps(body).encode("utf-8", "surrogatepass"))

    run()


SURROGATES = ["\ud800", "a\udfffb", "\udc00\ud800", "\ud83d" * 50]


@pytest.mark.parametrize("place", BODIES)
def test_lone_surrogates_anywhere_are_answered(url, place):
    def changed(node, text):
        """The body with the text in place of each of its strings, one after the other."""
        if isinstance(node, dict):
            for key, value in node.items():
                yield from (node | {key: each} for each in changed(value, text))
            yield node | {text: text}
        elif isinstance(node, list):
            for i, value in enumerate(node):
                yield from ([*node[:i], each, *node[i + 1 :]] for each in changed(value, text))
        elif isinstance(node, str):
            yield text
            yield node + text

    for text in SURROGATES[:NUM_EXAMPLES]:
        for body in changed(BODIES[place], text):
            for as_escapes in (True, False):
                data = json.dumps(body, ensure_ascii=as_escapes).encode("utf-8", "surrogatepass")
                send(url, place.partition("#")[0], data)


NAMES = st.sampled_from(
    ["content-type", "content-encoding", "accept", "accept-encoding", "authorization", "x-api-key", "x-request-id",
     "x-data-parallel-rank", "x-session-id", "anthropic-version", "anthropic-beta", "origin", "cookie", "range",
     "if-none-match", "traceparent", "tracestate", "forwarded", "x-forwarded-for", "x-forwarded-proto", "te", "via",
     "access-control-request-method", "accept-language", "user-agent", "upgrade", "priority"]
) | st.from_regex(r"[A-Za-z0-9-]{1,20}", fullmatch=True)  # fmt: skip
VALUES = st.sampled_from(
    ["", "gzip", "deflate", "br", "zstd", "identity", "gzip, gzip", "x", "*/*", "application/json; charset=utf-16",
     "application/json;charset=latin-1", "application/json;", "text/event-stream", "multipart/form-data", "-1", "1",
     "99999999999999999999", "Bearer", "Bearer ", "Basic Og==", "bytes=0-", "00-0-0-0", "websocket", "h2c", "y" * 8000]
) | st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=60)  # fmt: skip


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_any_headers_are_answered(url, method, path):
    address = url.partition("//")[2]

    @fuzz
    @given(headers=st.lists(st.tuples(NAMES, VALUES), max_size=6))
    def run(headers):
        connection = http.client.HTTPConnection(address, timeout=TIMEOUT_S)
        place = path.replace("{", "").replace("}", "")
        body = json.dumps(BODIES.get(path, {})).encode() if method == "post" else b""
        connection.putrequest(method.upper(), place, skip_accept_encoding=True)
        for name, value in [*headers, ("Content-Length", str(len(body)))]:
            connection.putheader(name, value.encode("latin-1"))
        connection.endheaders(body)
        with contextlib.closing(connection):
            answer = connection.getresponse()
            check(path, answer.status, answer.read().decode(errors="replace"))

    run()


ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "cp037"]


@pytest.mark.parametrize("place", BODIES)
@pytest.mark.parametrize("compression", ["identity", "gzip", "deflate"])
def test_any_encoding_of_a_body_is_answered(url, place, compression):
    squeeze = {"identity": bytes, "gzip": gzip.compress, "deflate": zlib.compress}

    @fuzz
    @given(
        encoding=st.sampled_from(ENCODINGS),
        told=st.sampled_from(["identity", "gzip", "deflate", "br", "zstd", "x"]) | st.just(compression),
        cut=st.integers(0, 40),
    )
    def run(encoding, told, cut):
        path = place.partition("#")[0]
        text = json.dumps(BODIES[place] | {"user": "\u00e9"}, ensure_ascii=False)
        data = squeeze[compression](text.encode(encoding))
        data = data[: len(data) - cut] if cut % 2 else data
        headers = {"Content-Type": "application/json", "Content-Encoding": told}
        answer = requests.post(url + path, data=data, headers=headers, timeout=TIMEOUT_S)
        check(path, answer.status_code, answer.text)

    run()

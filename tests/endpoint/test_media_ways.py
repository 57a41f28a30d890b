"""Every way into the endpoint, with every type of content part that vLLM knows: nothing is opened that is not allowed.

A server on this host stands for what must never be reached; the routes and the types are those of the installed vLLM,
so that an upgrade which brings a new one is tried, too.
"""

import http.server
import threading

import pytest
import pytest_asyncio

from epd.builtin import demo_image_path

from .fake_broker import says
from .serving import chat_body, serving
from .test_schema import OPERATIONS

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]


class Canary(http.server.BaseHTTPRequestHandler):
    """Notes who comes."""

    def do_GET(self):
        self.server.seen.append(self.path)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(demo_image_path().read_bytes())

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def canary():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Canary)
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory):
    from epd.endpoint.http import server

    apps, build = [], server.build_app
    server.build_app = lambda *args: apps.append(build(*args)) or apps[-1]
    try:
        async with serving(tmp_path_factory.mktemp("endpoint"), script=says([100])) as served:
            served.app = apps[0]
            yield served
    finally:
        server.build_app = build


def routes_of(app):
    """The (method, path) of each route that the app really has, whether its schema tells or not."""
    return {
        (method, route.path.replace(":path}", "}"))
        for route in app.routes
        for method in getattr(route, "methods", None) or ()
    }


def spellings(kind, address):
    """Content parts of a type that name `address`, in every way that any of the APIs has."""
    for value in (address, {"url": address}, {"data": address, "format": "wav"}, [address], {"x": address}):
        yield {"type": kind, kind: value}
        yield {kind: value}
        yield {"type": "text", "text": "x", "uuid": "u", kind: value}
        yield {"type": kind, kind: value, "uuid": "u"}
    yield {"type": kind, "image_url": address, "data": address, "url": address}
    yield {"type": kind, "source": {"type": "url", "url": address}}
    yield {"type": "tool_result", "tool_use_id": "t", "content": [{"type": kind, kind: address}]}


def bodies(part, address):
    """Bodies of any route with a content part in each place that may have one."""
    common = {"model": "digits", "max_tokens": 1, "max_output_tokens": 16}
    ask = [{"type": "text", "text": "?"}, part]
    yield common | {"messages": [{"role": "user", "content": ask}], "prompt": "x", "input": "x"}
    yield common | {"messages": [[{"role": "user", "content": ask}]], "input": [{"role": "user", "content": ask}]}
    answer = {"type": "function_call_output", "call_id": "c", "output": ask}
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    yield common | {"messages": [{"role": "tool", "tool_call_id": "c", "content": ask}], "input": [call, answer]}
    fields = {"state": "x", "questions": {"q": {"type": "noul"}}, "images": [address], "audio": [address]}
    yield common | fields | {"videos": [address], "multi_modal_data": {"image": address}, "prompt": [part]}
    yield common | {"query": [part], "documents": [{"content": [part]}], "items": [part], "token_ids": [1]}


async def test_the_app_has_no_other_routes_than_those_that_are_tried(served):
    known = {(method.upper(), path) for method, path in OPERATIONS}
    pages = {"/openapi.json", "/docs", "/docs/oauth2-redirect", "/redoc"}
    found = {(method, path) for method, path in routes_of(served.app) if path not in pages and method != "HEAD"}
    assert found <= known, "a route that is not in tests/endpoint/test_schema.py"


async def test_no_part_of_any_type_on_any_route_opens_what_is_not_allowed(served, canary):
    from vllm.renderers.chat_utils import MM_PARSER_MAP

    paths = sorted(path for method, path in routes_of(served.app) if method == "POST" and "{" not in path)
    assert len(paths) > 10
    kinds = sorted({*MM_PARSER_MAP, "image", "input_file", "document", "new_type"})
    for kind in kinds:
        served.broker.submits.clear()
        address = f"http://127.0.0.1:{canary.server_port}/{kind}"
        every = [body for part in spellings(kind, address) for body in bodies(part, address)]
        for path in paths:
            # Each route with a different part of them, all of them for chats.
            for body in every if path == "/v1/chat/completions" else every[paths.index(path) :: 7]:
                answer, text = await served.post(path, body)
                assert answer.status < 500 or answer.status == 501, (path, body, text)
    assert canary.seen == []


async def test_what_the_check_of_bodies_would_not_see_is_not_opened_either(served, canary, monkeypatch):
    from vllm.renderers.chat_utils import MM_PARSER_MAP

    from epd.endpoint.http import limits

    monkeypatch.setattr(limits, "media_in", lambda *_: [])
    for kind in MM_PARSER_MAP:
        for scheme in ("http", "https", "HTTP", "ftp", "file"):
            address = f"{scheme}://127.0.0.1:{canary.server_port}/{kind}"
            for part in spellings(kind, address):
                answer, text = await served.post("/v1/chat/completions", chat_body([part]))
                assert answer.status < 500, (part, text)
    for part in ({"type": "image_pil", "image_pil": address}, {"type": "image_url", "image_url": {"url": address}}):
        answer, text = await served.post("/v1/chat/completions", chat_body([part]))
        assert answer.status == 400, text
    assert canary.seen == []


async def test_what_only_a_program_can_give_is_refused_before_anything_is_opened(served, canary):
    served.broker.submits.clear()
    address = f"http://127.0.0.1:{canary.server_port}/"
    for kind in ("image_pil", "image_embeds", "audio_embeds", "video_embeds", "prompt_embeds"):
        for part in ({"type": kind, kind: address}, {kind: address}, {"type": "text", "uuid": "x", kind: address}):
            answer, body = await served.chat(content=[part])
            assert answer.status == 400 and kind in body["error"]["message"]
    assert canary.seen == [] and not served.broker.submits


@pytest.mark.parametrize("item", ["http://127.0.0.1:9/x", "/etc/passwd", b"x", ["x"], {"image": "x"}, ("x", 1), 7])
async def test_the_processor_is_given_nothing_that_it_would_open_by_itself(item):
    from epd.endpoint.http.refusals import RefusedError
    from epd.endpoint.media.processor_cache import check_decoded

    with pytest.raises(RefusedError, match="not supported"):
        check_decoded({"image": [item]})


async def test_pixels_and_samples_are_given_to_the_processor():
    import numpy as np
    from PIL import Image
    from vllm.multimodal.media import MediaWithBytes

    from epd.endpoint.media.processor_cache import check_decoded

    picture, frames, sound = Image.new("RGB", (2, 2)), np.zeros((2, 2, 2, 3)), np.zeros(9)
    chunk = {"type": "image", "image": picture, "uuid": "x"}
    check_decoded({"image": [picture, None], "video": [MediaWithBytes((frames, {}), b"")], "audio": [(sound, 16000)]})
    check_decoded({"vision_chunk": [chunk, {"type": "video_chunk", "video_chunk": [picture], "prompt": "x"}]})


async def test_the_endpoint_still_answers(served):
    answer, _ = await served.chat()
    assert answer.status == 200

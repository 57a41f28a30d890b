"""Any id that was given back can be asked for: its story, and its cancel; by the key that it came with alone."""

import asyncio
import json
from urllib.parse import quote

import pytest
import pytest_asyncio

from .fake_broker import never, says
from .serving import chat_body, events, serving, until
from .uploading import KEYS, key

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]

NAMES = [
    "team-42", "team/42", "/", "//a//", "../../x", "a/cancel", "cancel", "a b", "a?b=c", "a#b", "100%", "a%2Fb", "%",
    "é/ü", "a;b,c", 'a"b', "a\\b", "a:b@c", "a+b", "~a.b", "x" * 200,
]  # fmt: skip
ANTHROPIC = {"messages": [{"role": "user", "content": "Read."}], "max_tokens": 3, "model": "digits"}
ROUTES = {
    "/v1/chat/completions": chat_body(max_tokens=3),
    "/v1/completions": {"model": "digits", "prompt": "Read.", "max_tokens": 3},
    "/v1/responses": {"model": "digits", "input": "Read.", "max_output_tokens": 3},
    "/v1/messages": ANTHROPIC,
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory):
    serve = {"enable_request_id_headers": True}
    async with serving(tmp_path_factory.mktemp("endpoint"), api_keys=KEYS, drain_s=1.0, serve=serve) as served:
        yield served


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def nothing_is_left(served):
    served.broker.script = says([100, 101, 102])
    served.broker.submits.clear()
    yield
    await served.idle()


def url(request_id, end=""):
    from yarl import URL

    return URL(f"/v1/requests/{quote(request_id, safe='')}{end}", encoded=True)


async def story(served, request_id, **options):
    async with served.session.get(url(request_id), **options) as answer:
        return answer.status, await answer.json()


async def cancel(served, request_id, **options):
    async with served.session.post(url(request_id, "/cancel"), **options) as answer:
        return answer.status, await answer.json()


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
async def test_the_id_of_an_answer_has_a_story(served, name):
    headers = {"X-Request-Id": name} if name.isascii() else {"X-Request-Id": name.encode().decode("latin-1")}
    answer, text = await served.post("/v1/chat/completions", chat_body(max_tokens=3), headers=headers)
    assert answer.status == 200, text
    for request_id in (json.loads(text)["id"], answer.headers["X-Request-Id"]):
        status, told = await story(served, request_id)
        assert (status, told["state"], len(told["requests"])) == (200, "finished", 1), request_id
        assert told["id"] == request_id
        assert await cancel(served, request_id) == (200, {"id": request_id, "cancelled": 0})


@pytest.mark.parametrize("name", NAMES[:8], ids=range(8))
@pytest.mark.parametrize("by_header", [False, True], ids=["id", "header"])
async def test_a_request_under_way_is_cancelled_by_any_id(served, name, by_header):
    served.broker.script = never
    asked = asyncio.create_task(served.post("/v1/chat/completions", chat_body(), headers={"X-Request-Id": name}))
    await until(lambda: served.broker.submits)
    status, told = await cancel(served, name if by_header else f"chatcmpl-{name}")
    assert (status, told["cancelled"]) == (200, 1)
    assert (await asked)[0].status == 499


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("given", [{}, {"X-Request-Id": "team/7"}], ids=["unnamed", "named"])
@pytest.mark.parametrize("path", ROUTES)
async def test_every_api_gives_ids_that_can_be_asked_for(served, path, given, stream):
    answer, text = await served.post(path, ROUTES[path] | {"stream": stream}, headers=given)
    assert answer.status == 200, text
    first = events(text)[0] if stream else json.loads(text)
    first = first.get("response") or first.get("message") or first
    for request_id in (first["id"], answer.headers["X-Request-Id"]):
        status, told = await story(served, request_id)
        assert (status, told["state"]) == (200, "finished"), request_id
        assert [event["event"] for event in told["events"]][-1] == "finished"


async def test_a_story_is_only_for_its_key(served):
    answer, text = await served.post("/v1/chat/completions", chat_body(max_tokens=3), **key(0))
    for request_id in (json.loads(text)["id"], answer.headers["X-Request-Id"]):
        assert (await story(served, request_id, **key(0)))[0] == 200
        for ask in (story, cancel):
            status, told = await ask(served, request_id, **key(1))
            assert (status, told["error"]["type"]) == (404, "not_found")
    unknown = await story(served, "chatcmpl-none", **key(1))
    assert unknown[0] == 404 and unknown[1]["error"]["type"] == "not_found"


async def test_two_keys_with_the_same_name_see_their_own_only(served):
    for which in (0, 1):
        headers = key(which)["headers"] | {"X-Request-Id": "shared/name"}
        await served.post("/v1/chat/completions", chat_body(max_tokens=3), headers=headers)
    for which in (0, 1):
        told = (await story(served, "chatcmpl-shared/name", **key(which)))[1]
        assert len(told["requests"]) == 1


async def test_anthropics_clients_are_let_in_by_their_header_and_told_errors_in_their_shape(served):
    async with served.session.post(
        "/v1/messages", json=ANTHROPIC, headers={"Authorization": "", "x-api-key": KEYS[1]}
    ) as ok:
        told = await ok.json()
        assert (ok.status, told["type"]) == (200, "message")
    assert (await story(served, told["id"], headers={"Authorization": "", "x-api-key": KEYS[1]}))[0] == 200
    assert (await story(served, told["id"], **key(0)))[0] == 404
    wrong = [
        (ANTHROPIC, {"Authorization": "", "x-api-key": "wrong"}, 401, "authentication_error"),
        (ANTHROPIC | {"model": "no"}, {}, 404, "NotFoundError"),
        ({"model": "digits"}, {}, 400, "invalid_request_error"),
    ]
    for body, headers, status, word in wrong:
        async with served.session.post("/v1/messages", json=body, headers=headers) as answer:
            told = await answer.json()
            assert (answer.status, told["type"], told["error"]["type"]) == (status, "error", word), told
            assert isinstance(told["error"]["message"], str)
    async with served.session.get("/v1/messages") as answer:
        assert (answer.status, (await answer.json())["type"]) == (405, "error")

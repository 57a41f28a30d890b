"""API keys as the world sends them, and who is told what without one."""

import json

import pytest

from epd.endpoint.http.authentication import ApiKeys
from epd.endpoint.http.keys import owner_of

from .asgi_call import call

KEYS = ["first", "sécond"]


def guarded(keys=KEYS):
    seen = []

    async def app(scope, _receive, send):
        seen.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    return ApiKeys(app, keys), seen


RIGHT = [
    {"authorization": "Bearer first"},
    {"authorization": "bearer  first "},
    {"authorization": "BEARER first"},
    {"x-api-key": "first"},
    {"x-api-key": " first "},
    {"x-api-key": "first", "authorization": "Bearer of-a-gateway"},
    {"x-api-key": "of-a-gateway", "authorization": "Bearer first"},
    {"authorization": "Basic Zmlyc3Q=", "x-api-key": "first"},
]
WRONG = [{}, {"authorization": "Bearer wrong"}, {"x-api-key": "wrong"}, {"x-api-key": ""}, {"authorization": "first"},
         {"authorization": "Basic first"}, {"authorization": "Bearer "}, {"api-key": "first"}]  # fmt: skip


def in_bytes(headers):
    return [(name.encode(), value.encode()) for name, value in headers.items()]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/invocations", "/v1/requests/a/b"])
@pytest.mark.parametrize("headers", RIGHT, ids=str)
async def test_a_right_key_is_taken_and_is_one_and_the_same_owner(headers, path):
    app, seen = guarded()
    assert (await call(app, path=path, headers=in_bytes(headers))).status == 200
    assert owner_of(seen[0], has_keys=True) == owner_of(
        {"headers": [(b"authorization", b"Bearer first")]}, has_keys=True
    )
    assert (b"authorization", b"Bearer first") in seen[0]["headers"]
    assert not [name for name, _ in seen[0]["headers"] if name == b"x-api-key"]


async def test_keys_differ_by_owner():
    app, seen = guarded()
    for key in KEYS:
        assert (await call(app, headers=in_bytes({"x-api-key": key}))).status == 200
    first, second = (owner_of(scope, has_keys=True) for scope in seen)
    assert first != second


@pytest.mark.parametrize("headers", WRONG, ids=str)
async def test_without_a_right_key_openais_clients_get_401_in_their_shape(headers):
    app, seen = guarded()
    answer = await call(app, path="/v1/chat/completions", headers=in_bytes(headers))
    assert (answer.status, seen) == (401, [])
    assert answer.error == {"message": "missing or wrong API key", "type": "unauthorized", "param": None, "code": 401}
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
@pytest.mark.parametrize("headers", WRONG, ids=str)
async def test_without_a_right_key_anthropics_clients_get_401_in_their_shape(headers, path):
    app, seen = guarded()
    answer = await call(app, path=path, headers=in_bytes(headers))
    assert (answer.status, seen) == (401, [])
    told = {"type": "authentication_error", "message": "missing or wrong API key"}
    assert json.loads(answer.body) == {"type": "error", "error": told}


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/debug/held", "/ping", "/version", "/load"])
async def test_monitoring_needs_no_key(path):
    app, _ = guarded()
    assert (await call(app, path=path)).status == 200
    assert (await call(app, path=path + "/x")).status == 401


async def test_browsers_may_ask_what_is_allowed():
    app, _ = guarded()
    assert (await call(app, method="OPTIONS", path="/v1/chat/completions")).status == 200

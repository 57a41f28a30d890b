"""All bodies together are bounded, and each is let go of with its exchange."""

import asyncio
import json

import pytest

from epd.endpoint.http.bodies import Bodies

from .asgi_call import call


async def reads(scope, receive, send):
    """An app that answers with the size of the body."""
    size, more = 0, True
    while more:
        message = await receive()
        size += len(message["body"])
        more = message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": str(size).encode()})


async def test_bodies_that_fit_pass_one_after_the_other():
    app = Bodies(reads, 100)
    for _ in range(5):
        assert (await call(app, body=b"x" * 80)).body == b"80"
    assert app.num_bytes == 0


@pytest.mark.parametrize("headers", [[], [(b"content-length", b"60")]])
async def test_a_body_beyond_the_bound_is_refused_while_another_is_under_way(headers):
    finish, entered = asyncio.Event(), asyncio.Event()

    async def holds(scope, receive, send):
        await reads(scope, receive, send)
        entered.set()
        await finish.wait()

    app = Bodies(holds, 100)
    first = asyncio.create_task(call(app, body=b"x" * 60))
    await entered.wait()
    answer = await call(app, body=b"x" * 60, headers=headers)
    assert answer.status == 503 and answer.headers["retry-after"] == "1"
    assert json.loads(answer.body)["error"]["type"] == "overloaded"
    assert app.num_bytes == 60
    finish.set()
    assert (await first).status == 200 and app.num_bytes == 0


async def test_requests_without_a_body_are_never_refused():
    app = Bodies(reads, 0)
    assert (await call(app, method="GET")).status == 200


async def test_what_an_application_raises_leaves_nothing_counted():
    async def fails(scope, receive, send):
        await receive()
        raise ValueError("broken")

    app = Bodies(fails, 100)
    with pytest.raises(ValueError, match="broken"):
        await call(app, body=b"x" * 60)
    assert app.num_bytes == 0

"""Handlers that stumble over their input: the client's fault, as long as nothing was submitted or answered."""

import pytest

from epd.endpoint.http.exchange import current_exchange
from epd.endpoint.http.failures import ExplicitErrors
from epd.endpoint.http.unreadable import UnreadableInput

from .asgi_call import call


def raising(error, *, submitted=False, answered=False):
    async def app(_scope, _receive, send):
        current_exchange.get().has_submitted = submitted
        if answered:
            await send({"type": "http.response.start", "status": 200, "headers": []})
        raise error

    return ExplicitErrors(UnreadableInput(app))


@pytest.mark.parametrize("error", [IndexError("list index"), AttributeError("get"), TypeError("int"), ValueError("x")])
async def test_an_exception_before_anything_was_done_is_answered_by_400(error):
    answer = await call(raising(error))
    assert answer.status == 400 and answer.error["type"] == "invalid_request"
    assert type(error).__name__ in answer.error["message"]


@pytest.mark.parametrize("error", [OSError("disk"), MemoryError(), RuntimeError("?")])
async def test_what_no_input_can_be_blamed_for_stays_an_error_of_the_server(error):
    with pytest.raises(type(error)):
        await call(raising(error))


@pytest.mark.parametrize("when", ["submitted", "answered"])
async def test_an_exception_after_that_stays_an_error_of_the_server(when):
    with pytest.raises(IndexError):
        await call(raising(IndexError("x"), **{when: True}))

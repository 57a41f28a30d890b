"""How a failure reaches the client, over ASGI apps that behave as vLLM's handlers do."""

import json

import pytest

from epd.endpoint.http.exchange import current_exchange
from epd.endpoint.http.failures import ExplicitErrors, Failure

from .asgi_call import call

LOST = Failure(code="worker_lost", message="decode-0 died", status=502, retry_after_s=2.5)


def answers(status, *chunks, content_type=b"application/json", failure=None, fails_after=0, raises=None):
    """An app that sends `chunks`; the failure is noted after `fails_after` of them, then it raises, if asked to."""

    async def app(_scope, _receive, send):
        if failure and not fails_after:
            current_exchange.get().failure = failure
        headers = [(b"content-type", content_type), (b"access-control-allow-origin", b"*")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for i, chunk in enumerate(chunks, 1):
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            if failure and fails_after == i:
                current_exchange.get().failure = failure
        if raises:
            raise raises
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    return ExplicitErrors(app)


def stream(*chunks, **options):
    return answers(200, *chunks, content_type=b"text/event-stream; charset=utf-8", **options)


async def test_a_failed_answer_has_our_status_code_word_and_retry_after():
    answer = await call(answers(500, b'{"error": "vague"}', failure=LOST))
    assert answer.status == 502 and answer.ended
    assert answer.error == {"message": "decode-0 died", "type": "worker_lost", "param": None, "code": 502}
    assert answer.headers["retry-after"] == "3"
    assert answer.headers["access-control-allow-origin"] == "*"


async def test_messages_answers_in_anthropics_shape():
    answer = await call(answers(500, b"{}", failure=LOST), path="/v1/messages")
    assert json.loads(answer.body) == {
        "type": "error",
        "error": {"type": "worker_lost", "message": "decode-0 died"},
    }


async def test_a_stream_that_has_not_begun_fails_by_its_status():
    answer = await call(stream(b"data: {}\n\n", failure=LOST))
    assert answer.status == 502 and answer.error["type"] == "worker_lost"
    assert answer.headers["content-type"] == "application/json"


async def test_an_error_of_vllm_as_the_first_event_becomes_the_status():
    event = {"error": {"message": "too long", "type": "BadRequestError", "param": None, "code": 400}}
    answer = await call(stream(b"data: " + json.dumps(event).encode() + b"\n\n", b"data: [DONE]\n\n"))
    assert answer.status == 400 and answer.error["message"] == "too long"


async def test_a_stream_that_goes_well_is_left_alone():
    chunks = [b'data: {"a": 1}\n\n', b"data: [DONE]\n\n"]
    answer = await call(stream(*chunks))
    assert answer.status == 200 and answer.ended and answer.chunks == [*chunks, b""]


async def test_vllms_own_error_event_in_a_stream_that_has_begun_says_our_word():
    event = b'data: {"error": {"message": "worker_lost: decode-0 died", "type": "Bad Gateway", "code": 502}}\n\n'
    done = b"data: [DONE]\n\n"
    answer = await call(stream(b"data: 1\n\n", event, done, failure=LOST, fails_after=1))
    assert answer.status == 200 and answer.ended and answer.chunks[2] == done
    error = json.loads(answer.chunks[1].removeprefix(b"data: "))["error"]
    assert (error["type"], error["message"], error["code"]) == ("worker_lost", "decode-0 died", 502)
    answer = await call(stream(b"data: 1\n\n", event))
    assert answer.chunks[1] == event, "it is not ours"


async def test_an_exception_in_a_stream_that_has_begun_is_an_error_event():
    app = stream(b"event: response.created\ndata: {}\n\n", failure=LOST, fails_after=1, raises=ValueError())
    answer = await call(app, path="/v1/responses")
    assert answer.status == 200 and answer.ended
    name, data = answer.chunks[-1].decode().strip().split("\n")
    assert name == "event: error"
    error = json.loads(data.removeprefix("data: "))
    assert error == {"type": "error", "code": "worker_lost", "message": "decode-0 died", "param": None}


async def test_an_unexplained_exception_in_a_stream_is_an_error_event_too():
    answer = await call(stream(b"data: 1\n\n", raises=ValueError("secret")))
    assert answer.ended and b"engine_failed" in answer.chunks[-1] and b"secret" not in answer.body


async def test_anthropics_error_event_says_our_reason():
    vague = b'event: error\ndata: {"type": "error", "error": {"type": "internal_error"}}\n\n'
    app = stream(b"event: message_start\ndata: {}\n\n", vague, failure=LOST, fails_after=1)
    answer = await call(app, path="/v1/messages")
    assert b"worker_lost" in answer.chunks[1] and b"internal_error" not in answer.body


async def test_an_exception_before_an_answer_is_passed_on():
    async def app(_scope, _receive, _send):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        await call(ExplicitErrors(app))


async def test_a_failure_that_was_overcome_does_not_change_a_good_answer():
    answer = await call(answers(200, b"fine", failure=LOST))
    assert answer.status == 200 and answer.body == b"fine"


@pytest.mark.parametrize(
    ("status", "body", "word", "message"),
    [
        (400, b'{"error": {"message": "no max_tokens", "type": "Bad Request", "code": 400}}', "invalid_request_error",
         "no max_tokens"),
        (401, b'{"error": "Unauthorized"}', "authentication_error", "Unauthorized"),
        (404, b'{"detail": "Not Found"}', "not_found_error", "Not Found"),
        (405, b'{"detail": "Method Not Allowed"}', "invalid_request_error", "Method Not Allowed"),
        (413, b"too large", "request_too_large", "too large"),
        (422, b'{"detail": [{"loc": ["a"]}]}', "invalid_request_error", '[{"loc": ["a"]}]'),
        (429, b"", "rate_limit_error", ""),
        (500, b"\xff", "api_error", "�"),
        (503, b"[1]", "overloaded_error", "[1]"),
    ],
)  # fmt: skip
async def test_every_error_on_messages_has_anthropics_shape(status, body, word, message):
    answer = await call(answers(status, body[:3], body[3:]), path="/v1/messages")
    assert (answer.status, answer.ended) == (status, True)
    assert json.loads(answer.body) == {"type": "error", "error": {"type": word, "message": message}}
    assert int(answer.headers["content-length"]) == len(answer.body)
    assert answer.headers["access-control-allow-origin"] == "*"
    assert (await call(answers(status, body), path="/v1/chat/completions")).body == body, "only there"


async def test_an_error_that_has_anthropics_shape_is_left_alone():
    body = b'{"type": "error", "error": {"type": "NotFoundError", "message": "no such model"}}'
    assert (await call(answers(404, body), path="/v1/messages/count_tokens")).body == body


async def test_every_request_has_a_name_that_vllm_makes_its_ids_from():
    names = []

    async def app(scope, _receive, send):
        [name] = [value for name, value in scope["headers"] if name == b"x-request-id"]
        names.append(name)
        assert current_exchange.get().name == name.decode("latin-1")
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    await call(ExplicitErrors(app), headers=[(b"x-request-id", b"team/42")])
    await call(ExplicitErrors(app))
    await call(ExplicitErrors(app), headers=[(b"x-request-id", b"")])
    assert names[0] == b"team/42"
    assert len(set(names)) == 3 and all(len(name) == 16 for name in names[1:])

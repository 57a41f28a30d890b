"""One line in the log for each request: its id, how it ended, what it took, who worked on it."""

import asyncio
import json
import logging
import sys

import pytest
import structlog
from vllm.exceptions import VLLMValidationError

from epd.endpoint.engine.submission import PipelineError
from epd.endpoint.http.authentication import ApiKeys
from epd.endpoint.http.exchange import Exchange, Part, current_exchange
from epd.endpoint.http.failures import ExplicitErrors, failure_of
from epd.endpoint.ops.request_log import WATCHED_PATHS, RequestLog, describe, quiet_refusals
from epd.endpoint.ops.stories import Stories
from epd.errors import ErrorCode
from epd.messages import StoryEvent

from .asgi_call import call
from .fake_broker import fails, never, says
from .serving import chat_body, serving, until, with_picture
from .uploading import KEYS


async def logged(app, stories=None, **options):
    with structlog.testing.capture_logs() as entries:
        answer = await call(RequestLog(app, stories or Stories(10)), **options)
    return answer, [entry for entry in entries if entry["event"] == "request"]


def answers(status=200, parts=(), failure=None):
    async def app(_scope, _receive, send):
        exchange = current_exchange.get()
        exchange.parts += parts
        exchange.failure = failure
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    return ExplicitErrors(app)


async def test_an_exchange_is_one_line_with_its_address_and_status():
    _, [line] = await logged(answers(204), path="/v1/models", method="GET", headers=[(b"x-request-id", b"mine")])
    assert line["took_s"] >= 0
    told = {"event": "request", "id": "mine", "method": "GET", "path": "/v1/models", "status": 204}
    assert {key: value for key, value in line.items() if key not in ("took_s", "log_level")} == told


async def test_what_is_refused_before_anything_has_a_line_too():
    _, [line] = await logged(ApiKeys(answers(), ["key"]), path="/v1/chat/completions")
    assert line["status"] == 401


@pytest.mark.parametrize("path", sorted(WATCHED_PATHS))
async def test_what_is_asked_for_every_few_seconds_has_none(path):
    assert (await logged(answers(503), path=path))[1] == []


async def test_an_application_that_breaks_has_a_line():
    async def app(*_):
        raise RuntimeError("broken")

    with structlog.testing.capture_logs() as entries, pytest.raises(RuntimeError):
        await call(RequestLog(app, Stories(10)))
    assert [entry["status"] for entry in entries] == [500]


async def test_a_client_that_has_left_is_told_from_one_that_has_its_answer():
    async def app(_scope, receive, _send):
        while (await receive())["type"] != "http.disconnect":
            pass

    _, [line] = await logged(app)
    assert (line["status"], line["client_left"]) == (499, True)


def test_tokens_times_and_workers_are_those_of_all_parts():
    stories = Stories(10)
    exchange = Exchange(name="x")
    exchange.began_at = 100.0
    for number, worker in enumerate(("decode-0", "decode-1")):
        stories.open(f"p{number}", "cmpl-x")
        story = (("accepted", ""), ("encode", "encode-0"), ("first token", "prefill-0"), ("finished", worker))
        events = [StoryEvent(at_s=0, event=event, worker=name) for event, name in story]
        stories.close(f"p{number}", "finished", "stop", events)
        exchange.parts.append(
            Part(request_id=f"p{number}", client_id="cmpl-x", num_prompt_tokens=50, num_cached_tokens=16, num_patches=9,
                 num_output_tokens=3 + number, first_at=100.5 - number / 4)
        )  # fmt: skip
    told = [stories.get("p0"), stories.get("p1")]
    assert describe(exchange, told, took_s=1.23456) == {
        "id": "cmpl-x", "took_s": 1.2346, "ttft_s": 0.25, "prompt_tokens": 50, "cached_tokens": 16, "output_tokens": 7,
        "patches": 9, "workers": "encode-0,prefill-0,decode-0,decode-1", "ended": "finished: stop",
    }  # fmt: skip


def test_several_prompts_count_each_and_many_ids_are_cut_short():
    exchange = Exchange()
    exchange.parts = [Part(request_id=f"{i}", client_id=f"cmpl-x-{i}", num_prompt_tokens=10) for i in range(6)]
    line = describe(exchange, [], took_s=0)
    assert (line["prompt_tokens"], line["cached_tokens"], line["ttft_s"]) == (60, 0, None)
    assert line["id"] == "cmpl-x-0,cmpl-x-1,cmpl-x-2,cmpl-x-3,+2"


def test_a_failure_is_told_with_its_reason():
    exchange = Exchange()
    exchange.failure = failure_of(ErrorCode.WORKER_LOST, "decode-0 died")
    line = describe(exchange, [], took_s=0)
    assert (line["error"], line["reason"]) == ("worker_lost", "decode-0 died")


def test_what_is_said_of_a_refused_request_by_others_is_not_repeated_with_a_traceback():
    heard = []
    handler = logging.Handler()
    handler.emit = heard.append
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        quiet_refusals(VLLMValidationError, PipelineError)
        known = PipelineError(failure_of(ErrorCode.OVERLOADED, "full"))
        for error in (VLLMValidationError("too long"), known, RuntimeError("new")):
            try:
                raise error
            except Exception:
                logging.getLogger("entrypoints").error("failed", exc_info=sys.exc_info())
        logging.getLogger("entrypoints").error("without")
    finally:
        root.removeHandler(handler)
    assert [record.exc_info and type(record.exc_info[1]) for record in heard] == [RuntimeError, None]


# --- of an endpoint


@pytest.mark.engine
class TestServed:
    async def lines(self, tmp_path, script, ask, **options):
        with structlog.testing.capture_logs() as entries:
            async with serving(tmp_path, script=script, **options) as served:
                await ask(served)
                await served.idle()
                await until(lambda: any(entry["event"] == "request" for entry in entries))
        return [entry for entry in entries if entry["event"] == "request"]

    async def test_a_chat_with_a_picture(self, tmp_path):
        async def ask(served):
            body = chat_body(with_picture(), max_tokens=3)
            for stream in (False, True):
                headers = {"X-Request-Id": f"team/{stream}"}
                assert (await served.post("/v1/chat/completions", body | {"stream": stream}, headers=headers))[
                    0
                ].status == 200

        first, second = await self.lines(tmp_path, says([100, 101, 102], delay_s=0.02), ask)
        assert [first["id"], second["id"]] == ["chatcmpl-team/False", "chatcmpl-team/True"]
        for line in (first, second):
            assert (line["status"], line["output_tokens"], line["patches"]) == (200, 3, 9)
            assert line["prompt_tokens"] > 36 and 0 < line["ttft_s"] < line["took_s"]
            assert (line["workers"], line["ended"]) == ("decode-0", "finished: length")

    async def test_one_that_fails_one_that_is_refused_and_one_without_a_key(self, tmp_path):
        async def ask(served):
            await served.post("/v1/chat/completions", chat_body())
            await served.post("/v1/chat/completions", chat_body(max_tokens=-1))
            await served.post("/v1/chat/completions", chat_body(), headers={"Authorization": "Bearer no"})

        script = fails(code="worker_lost", message="decode-0 died", status=502)
        failed, refused, unknown = await self.lines(tmp_path, script, ask, api_keys=KEYS)
        assert (failed["status"], failed["error"], failed["reason"]) == (502, "worker_lost", "decode-0 died")
        assert failed["ended"].startswith("failed: worker_lost")
        assert (refused["status"], unknown["status"]) == (400, 401)

    async def test_one_whose_client_leaves(self, tmp_path):
        async def ask(served):
            asked = asyncio.create_task(served.post("/v1/chat/completions", chat_body()))
            await until(lambda: served.broker.submits)
            asked.cancel()
            await until(lambda: served.broker.cancels)

        [line] = await self.lines(tmp_path, never, ask)
        assert (line["status"], line["client_left"], line["output_tokens"]) == (499, True, 0)

    async def test_no_lines_where_nobody_wants_any(self, tmp_path):
        async def ask(served):
            await served.get("/v1/models")

        with structlog.testing.capture_logs() as entries:
            async with serving(tmp_path, script=never, serve={"disable_uvicorn_access_log": True}) as served:
                await ask(served)
        assert "request" not in [entry["event"] for entry in entries]

    async def test_requests_are_logged_with_their_parameters_where_that_is_asked_for(self, tmp_path):
        heard = []
        handler = logging.Handler()
        handler.emit = lambda record: heard.append(record.getMessage())
        logger = logging.getLogger("vllm.entrypoints.serve.utils.request_logger")
        logger.addHandler(handler)
        try:
            for wanted in (False, True):
                heard.clear()
                folder = tmp_path / str(wanted)
                folder.mkdir()
                async with serving(folder, script=says([100]), serve={"enable_log_requests": wanted}) as served:
                    answer, text = await served.chat()
                    assert answer.status == 200, json.dumps(text)
                received = [text for text in heard if text.startswith("Received request chatcmpl-")]
                assert len(received) == wanted and ("max_tokens=16" in "".join(received)) == wanted
        finally:
            logger.removeHandler(handler)
            logger.setLevel(logging.NOTSET)

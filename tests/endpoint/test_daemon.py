"""The daemon's life: it drains, it cuts off what does not end, it says why it cannot start."""

import asyncio
import json
import os
import subprocess
import sys

import pytest

from epd.config import Config, ConfigError
from epd.process import activation
from epd.process.lifecycle import Life

from .fake_broker import never, says
from .serving import chat_body, config_for, events, serving, until

pytestmark = pytest.mark.engine


async def test_a_drain_lets_streams_end_and_takes_no_new_requests(tmp_path):
    async with serving(tmp_path) as served:
        served.broker.script = says([100] * 10, delay_s=0.1)
        async with served.session.post("/v1/chat/completions", json=chat_body(stream=True)) as answer:
            await answer.content.readline()
            served.stop.set()
            refusal, text = await served.unready()
            assert json.loads(text)["missing"] == ["this endpoint is shutting down"]
            refusal, body = await served.chat()
            assert refusal.status == 503 and body["error"]["type"] == "shutting_down"
            rest = (await answer.content.read()).decode()
        assert events(rest)[-1] == "[DONE]" and "error" not in rest
        assert await asyncio.wait_for(served.task, 5) == 0
        await asyncio.wait_for(served.broker.goodbye.wait(), 1)


async def test_with_a_socket_of_its_supervisor_a_restart_refuses_nobody(tmp_path, monkeypatch):
    with activation.bind("127.0.0.1", 0) as sock:
        monkeypatch.setenv(activation.LISTEN_FD, str(os.dup(sock.fileno())))
        async with serving(tmp_path, script=says([100] * 10, delay_s=0.1)) as served:
            assert int((tmp_path / "port").read_text()) == sock.getsockname()[1]
            async with served.session.post("/v1/chat/completions", json=chat_body(stream=True)) as answer:
                await answer.content.readline()
                served.stop.set()
                await asyncio.sleep(0.2)
                reader, writer = await asyncio.open_connection(*sock.getsockname())
                writer.write(b"GET /health HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n")
                rest = (await answer.content.read()).decode()
            assert events(rest)[-1] == "[DONE]" and "error" not in rest
            assert await asyncio.wait_for(served.task, 5) == 0
        monkeypatch.setenv(activation.LISTEN_FD, str(os.dup(sock.fileno())))
        async with serving(tmp_path) as served:
            assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 200")
            writer.close()


async def test_what_does_not_end_in_time_is_cut_off_with_a_reason(tmp_path):
    async with serving(tmp_path, drain_s=0.2) as served:
        served.broker.script = never
        plain = asyncio.create_task(served.chat())
        streamed = asyncio.create_task(served.post("/v1/chat/completions", chat_body(stream=True)))
        await until(lambda: len(served.broker.submits) == 2)
        served.stop.set()
        answer, body = await asyncio.wait_for(plain, 3)
        assert answer.status == 503 and body["error"]["type"] == "shutting_down"
        assert (await asyncio.wait_for(streamed, 3))[0].status == 503
        assert await asyncio.wait_for(served.task, 5) == 0


async def test_a_request_that_outlives_its_deadline_is_ended_here_too(tmp_path, monkeypatch):
    from epd.endpoint.engine import flights

    monkeypatch.setattr(flights, "_DEADLINE_GRACE_S", 0.1)
    async with serving(tmp_path, request_timeout_s=0.2) as served:
        served.broker.script = never
        answer, body = await asyncio.wait_for(served.chat(), 3)
        assert answer.status == 504 and body["error"]["type"] == "deadline_exceeded"
        await until(lambda: served.broker.cancels)


async def test_a_dead_output_handler_ends_the_daemon_with_an_error(tmp_path, monkeypatch):
    from epd.endpoint.engine.engine_client import PipelineCore

    async with serving(tmp_path, exit_status=1) as served:

        async def broken(_self):
            raise RuntimeError("broken")

        monkeypatch.setattr(PipelineCore, "get_output_async", broken)
        served.broker.script = says([100])
        # The handler was waiting already and takes this output; it breaks on its next turn.
        assert (await served.chat())[0].status == 200
        assert await asyncio.wait_for(served.task, 10) == 1


@pytest.mark.parametrize(
    "config", [Config(), Config(model="/no/such/model"), config_for("tcp://127.0.0.1:1", serve={"nonsense": 1})]
)
async def test_a_wrong_configuration_is_exit_status_2(config, capsys):
    from epd.endpoint.daemon import main

    assert await main(config, "endpoint-0", Life()) == 2
    assert "cannot start" in "".join(capsys.readouterr())


async def test_the_broker_need_not_be_there_at_the_start(tmp_path, monkeypatch):
    from epd.endpoint.http.server import Endpoint

    async with Endpoint(config_for("tcp://127.0.0.1:9"), "endpoint-0") as endpoint:
        assert endpoint.port and not endpoint.view().registered


def test_importing_the_daemon_does_not_import_vllm():
    code = "import sys, epd.endpoint.daemon; print('vllm' in sys.modules, 'torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]


def test_config_errors_are_one_class():
    assert issubclass(ConfigError, ValueError)


async def test_it_is_ready_after_a_first_request_of_its_own_has_gone_the_whole_way(tmp_path):
    async with serving(tmp_path, script=says([100, 101]), warm_up=True) as served:
        [submit] = served.broker.submits
        assert submit.patches, "with a picture"
        answer, _ = await served.chat()
        assert answer.status == 200


async def test_a_first_request_that_fails_does_not_keep_it_from_being_ready(tmp_path, monkeypatch):
    from epd.endpoint.ops import warmup

    monkeypatch.setattr(warmup, "TIMEOUT_S", 0.2)
    async with serving(tmp_path, script=never, warm_up=True) as served:
        assert (await served.get("/ready"))[0].status == 200

"""Clients that stop reading: what piles up for them is bounded, and nobody else waits."""

import asyncio
import json
import socket

import pytest
import pytest_asyncio

from epd.messages import RequestOutput

from .fake_broker import output, says
from .serving import chat_body, serving, until

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="module")]
MAX_UNREAD = 20_000


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory):
    async with serving(tmp_path_factory.mktemp("endpoint"), drain_s=1.0, max_unread_bytes=MAX_UNREAD) as served:
        yield served


class Deaf:
    """A client on a bare socket that sends a request and then reads only what it is told to."""

    def __init__(self, served, **fields):
        self._port = served.session._base_url.port
        self._body = json.dumps(chat_body(stream=True, max_tokens=900, **fields)).encode()

    async def __aenter__(self):
        # Nothing is read ahead, and the kernel keeps little: what is not asked for stays in the server.
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self._port))
        self.reader, self.writer = await asyncio.open_connection(sock=sock, limit=1024)
        lines = ["POST /v1/chat/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
        lines += [f"Content-Length: {len(self._body)}", "", ""]
        self.writer.write("\r\n".join(lines).encode() + self._body)
        await self.writer.drain()
        return self

    async def __aexit__(self, *_):
        self.writer.close()


def pours(stopped, num_tokens=20, width=21):
    """A script: tokens with log-probabilities for ever, many in each output, as the kernel's buffers are large."""
    import numpy
    from vllm.v1.outputs import LogprobsLists

    ids = numpy.arange(num_tokens * width).reshape(num_tokens, width) % 256
    values, ranks = numpy.full((num_tokens, width), -1.0, dtype="float32"), numpy.ones(num_tokens, dtype="int64")

    async def script(broker, submit, _frames):
        while not broker.cancelled[submit.request_id].is_set():
            frames = output(submit.request_id, [100] * num_tokens, new_logprobs=LogprobsLists(ids, values, ranks, None))
            await broker.send(RequestOutput(request_id=submit.request_id, token_ids=[7]), frames)
            await asyncio.sleep(0.002)
        stopped.set()

    return script


async def test_a_client_that_stops_reading_loses_its_request_and_is_told_why(served):
    stopped = asyncio.Event()
    served.broker.script = pours(stopped)
    async with Deaf(served, logprobs=True, top_logprobs=20) as deaf:
        await asyncio.wait_for(stopped.wait(), 60)
        await served.idle()
        assert [each.reason for each in served.broker.cancels] == ["cancel"]
        served.broker.script = says([100])
        assert (await served.chat())[0].status == 200, "others are served"
        text = b""
        while b"[DONE]" not in text:
            text += await asyncio.wait_for(deaf.reader.read(65536), 10)
    assert b'"slow_client"' in text and b"does not read" in text


async def test_a_client_that_stops_reading_and_goes_leaves_nothing(served):
    stopped = asyncio.Event()
    served.broker.script = pours(stopped)
    async with Deaf(served, logprobs=True, top_logprobs=20):
        await asyncio.wait_for(stopped.wait(), 60)

    async def no_exchange():
        _, text = await served.get("/debug/held")
        return json.loads(text)["daemons"]["endpoint-0"]["exchanges"] == 1  # this one

    await until(no_exchange)


async def test_a_client_that_reads_gets_more_than_may_lie_unread(served):
    served.broker.script = says([100 + i % 100 for i in range(900)], delay_s=0.0)
    answer, text = await served.post("/v1/chat/completions", chat_body(stream=True, max_tokens=900))
    assert answer.status == 200 and "slow_client" not in text and '"finish_reason":"length"' in text
    assert 900 * len(output("r", [100])[0]) > MAX_UNREAD


async def test_an_answer_that_is_not_streamed_may_be_longer_than_that(served):
    served.broker.script = says([100 + i % 100 for i in range(300)], delay_s=0.0)
    answer, body = await served.chat(max_tokens=900)
    assert answer.status == 200 and body["usage"]["completion_tokens"] == 300

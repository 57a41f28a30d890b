"""The endpoint in this process, over a fake broker, and a client of it."""

import asyncio
import base64
import contextlib
import inspect
import json
import os
from pathlib import Path

import aiohttp

from epd.builtin import demo_image_path, model_path
from epd.config import BrokerConfig, Config, EndpointConfig
from epd.process.lifecycle import Life

from .fake_broker import FakeBroker

MODEL = str(model_path())
ENGINE = {"dtype": "bfloat16", "max_model_len": 1024, "enforce_eager": True}


def config_for(address, engine=ENGINE, model=MODEL, **endpoint):
    return Config(
        model=model,
        served_model_name="digits",
        engine=engine,
        broker=BrokerConfig(address=address),
        endpoint=EndpointConfig(**{"port": 0, "warm_up": False} | endpoint),
    )


class Served:
    """A running endpoint: `broker` behind it, `stop` and `task` of its daemon, and short ways to ask it."""

    def __init__(self, broker, session, stop, task):
        self.broker, self.session, self.stop, self.task = broker, session, stop, task

    async def get(self, path, **options):
        async with self.session.get(path, **options) as answer:
            return answer, await answer.text()

    async def post(self, path, body, **options):
        """The answer and its text."""
        async with self.session.post(path, json=body, **options) as answer:
            return answer, await answer.text()

    async def chat(self, **fields):
        """The answer and its JSON."""
        answer, text = await self.post("/v1/chat/completions", chat_body(**fields))
        return answer, json.loads(text)

    async def ready(self):
        """Waits until requests can be answered."""
        await until(self._ready)

    async def unready(self):
        """Waits until they cannot; returns /ready's answer and text."""
        await until(lambda: self._ready(wanted=503))
        return await self.get("/ready")

    async def idle(self):
        """Waits until nothing is in flight, as the metrics say."""
        await until(self._idle)

    async def _ready(self, wanted=200):
        return (await self.get("/ready"))[0].status == wanted

    async def _idle(self):
        return "epd_requests_in_flight 0.0" in (await self.get("/metrics"))[1]


async def until(check, timeout_s=10):
    """Waits until `check`, which may be a coroutine function, is true."""
    async with asyncio.timeout(timeout_s):
        while True:
            result = check()
            if await result if inspect.isawaitable(result) else result:
                return
            await asyncio.sleep(0.01)


def chat_body(content="Read.", **fields):
    return {"model": "digits", "max_tokens": 16, "messages": [{"role": "user", "content": content}]} | fields


def image_url(content=None, kind="png"):
    content = demo_image_path().read_bytes() if content is None else content
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def with_picture(text="Read the grid.", url=None):
    part = {"type": "image_url", "image_url": {"url": url or image_url()}}
    return [part, {"type": "text", "text": text}] if text else [part]


def events(text):
    """The data of each server-sent event."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) if line != "[DONE]" else line for line in lines]


@contextlib.asynccontextmanager
async def serving(folder: Path, exit_status=0, script=None, **endpoint):
    """Runs the daemon's `main` on this loop; it must end with `exit_status`."""
    from epd.endpoint.daemon import main

    os.environ["EPD_PORT_FILE"] = str(folder / "port")
    async with FakeBroker() as broker:
        broker.script = script
        stop = asyncio.Event()
        task = asyncio.create_task(main(config_for(broker.address, **endpoint), "endpoint-0", Life(stop)))
        port_file = folder / "port"
        await until(lambda: task.done() or port_file.exists(), timeout_s=100)
        assert not task.done(), task.result()
        port = int(port_file.read_text())
        keys = endpoint.get("api_keys")
        headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", headers=headers) as session:
            served = Served(broker, session, stop, task)
            await served.ready()
            yield served
        stop.set()
        assert await task == exit_status

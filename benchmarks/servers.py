"""A running pipeline and a running plain vLLM, for benchmarks and tests that talk HTTP to both."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import httpx

from epd.builtin import MODEL_NAME, model_path
from epd.config import Config
from epd.local import LocalPipeline

T = TypeVar("T")

MAX_MODEL_LEN = 2048
# On CPUs with AMX, bfloat16 rounds otherwise where many tokens are computed at once than where one is; where there are
# no instructions for it, it is emulated, and slow.
DTYPE = "float32"
MAX_IMAGES = 20


class Running:
    """A `LocalPipeline` on an event loop of its own, in a thread, for code that is not asynchronous."""

    def __init__(self, config: Config | None = None, **workers: int) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="pipeline", daemon=True)
        self._thread.start()
        self.pipeline = self.run(self._make(config or Config(), workers))
        self.http = httpx.Client(base_url=self.pipeline.url, timeout=60)

    @staticmethod
    async def _make(config: Config, workers: dict[str, int]) -> LocalPipeline:
        pipeline = LocalPipeline(config, **workers)
        await pipeline.start()
        return pipeline

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Runs something on the pipeline's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(120)

    def close(self) -> None:
        """Drains the pipeline; whatever it holds is left in the run directory when it did not end well."""
        self.http.close()
        self.run(self.pipeline.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def pid(self, name: str) -> int:
        """The process id of a daemon."""
        pid = self.pipeline.processes[name].pid
        assert pid
        return pid

    def signal(self, name: str, number: int) -> None:
        """Sends a daemon a signal."""
        os.kill(self.pid(name), number)

    def held(self) -> dict[str, float]:
        """The broker's gauges of what is held for requests, as `/metrics` shows them."""
        lines = self.http.get("/metrics").text.splitlines()
        return {
            line.split()[0]: float(line.split()[1]) for line in lines if line.startswith("epd_broker_held_")
        }  # fmt: skip

    def wait_idle(self, within_s: float = 10.0) -> None:
        """Returns when nothing is held any more; fails with what is."""
        deadline = time.monotonic() + within_s
        while any((held := self.held()).values()):
            assert time.monotonic() < deadline, held
            time.sleep(0.1)

    def wait_workers(self, stage: str, count: int, within_s: float = 10.0) -> None:
        """Returns when the endpoint knows exactly so many workers of a stage."""
        deadline = time.monotonic() + within_s
        while True:
            text = self.http.get("/metrics").text
            if f'epd_workers{{stage="{stage}"}} {float(count)}' in text:
                return
            assert time.monotonic() < deadline, [line for line in text.splitlines() if "epd_workers" in line]
            time.sleep(0.1)


@contextlib.contextmanager
def plain_vllm(log: Path, *options: str, model: Path | None = None) -> Iterator[httpx.Client]:
    """One plain vLLM serving the built-in model over HTTP, with the engine options of the pipeline's workers.

    `options` are further ones of `vllm serve`; `model` is another model, served under the same name.
    """
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    command = [
        *(str(Path(sys.executable).with_name("vllm")), "serve", str(model or model_path()), "--port", str(port)),
        *("--host", "127.0.0.1", "--served-model-name", MODEL_NAME, "--max-model-len", str(MAX_MODEL_LEN)),
        *("--enforce-eager", "--kv-cache-memory-bytes", str(256 << 20), "--dtype", DTYPE),
        *("--limit-mm-per-prompt", f'{{"image": {MAX_IMAGES}}}', "--distributed-executor-backend", "uni"),
        *options,
    ]
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    env.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    with log.open("w") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            with contextlib.suppress(httpx.TransportError):
                if client.get("/health").status_code == 200:
                    break
            time.sleep(0.2)
        yield client
    finally:
        client.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)

"""A worker daemon: one stage's engine in a thread, and beside it an event loop with one link to the broker.

Lives in a process of its own; owns the engine's thread and the link. The engine is built first; the worker registers
when it is ready. If the engine fails, or takes no command for `broker.hung_after_s`, the worker says goodbye and exits
with status 1, so that its supervisor starts a new one. At the first SIGTERM it stops taking work, and finishes what it
has within its stage's `drain_s`.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import structlog

from epd.config import Config, ConfigError
from epd.errors import one_line
from epd.messages import Draining, Kind, Message, Pools, Welcome, WorkerInfo
from epd.process import lifecycle, resources
from epd.process.lifecycle import Life, first
from epd.transport.link import BrokerLink
from workers.decode import DecodeStage
from workers.encode import EncodeStage
from workers.prefill import PrefillStage
from workers.stage import Frames, StageRunner
from workers.thread import EngineThread

log = structlog.get_logger()

STAGES: dict[str, type[StageRunner]] = {
    runner.stage.value: runner for runner in (EncodeStage, PrefillStage, DecodeStage)
}
# Engine thread and event loop share the interpreter: with Python's default of 5 ms, a message may wait that long.
SWITCH_INTERVAL_S = 0.0002
_STOP_S = 5.0
_WATCHES = 4


class EngineHungError(RuntimeError):
    """The engine thread has taken no command for too long."""


class Worker:
    """Joins a stage, its engine thread and the link; lives on the event loop."""

    def __init__(self, config: Config, stage: str, name: str) -> None:
        self._config, self._name = config, name
        self._loop = asyncio.get_running_loop()
        self._ready, self.failed, self._leaking = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.error: BaseException | None = None
        self._drain_s: float = getattr(config, stage).drain_s
        self._draining = False
        self._stage = STAGES[stage](config, name, self._post, self._call)
        self._thread = EngineThread(self._stage, self._on_ready, self._on_exit)
        threading.excepthook = self._on_thread_error
        self._link = BrokerLink(
            config.broker.address,
            name,
            Kind.WORKER,
            stage=lambda: self._stage.stage,
            info=self._info,
            on_message=self._on_message,
            on_registered=self._on_registered,
            on_lost=self._on_lost,
            steps=lambda: self._thread.num_steps,
            work=lambda: self._stage.work,
            held=lambda: resources.of_process() | self._thread.held,
            gauges=lambda: self._thread.gauges,
        )

    async def serve(self, life: Life) -> int:
        """Serves until it is stopped or the engine fails; returns the exit status."""
        started = time.monotonic()
        self._thread.start()
        await first(self._ready.wait(), self.failed.wait(), life.stop.wait())
        if not self._ready.is_set():
            return self._close()
        log.info("engine ready", seconds=round(time.monotonic() - started, 1))
        watching = asyncio.create_task(self._watch(), name="watch")
        try:
            return await self._serve(life)
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _serve(self, life: Life) -> int:
        async with self._link as link:
            await first(link.wait_registered(), self.failed.wait(), life.stop.wait())
            if link.registered:
                log.info("registered", incarnation=link.incarnation)
                life.ready()
            await life.end(self.failed.wait(), self._leaking.wait())
            if not self.failed.is_set():
                await self._drain()
            link.goodbye("the engine failed" if self.failed.is_set() else "stopped")
        return self._close() or int(self._leaking.is_set())

    async def _drain(self) -> None:
        """Takes no more work; returns when all work is done, the engine has failed, or time is up."""
        until = self._loop.time() + self._drain_s
        self._draining = True
        self._link.send(Draining())
        try:
            async with asyncio.timeout_at(until):
                await first(self.failed.wait(), self._in_engine(self._stage.drain))
        except TimeoutError:
            pass
        if self.failed.is_set():
            return
        if not await asyncio.to_thread(self._thread.wait_idle, max(0.0, until - self._loop.time())):
            log.warning("not everything was finished in time; the rest goes on elsewhere", drain_s=self._drain_s)

    async def _watch(self) -> None:
        """Ends the worker when its engine thread no longer takes commands, or has lost too much memory."""
        hung_after_s = self._config.broker.hung_after_s
        while True:
            try:
                async with asyncio.timeout(hung_after_s):
                    await self._in_engine(self._look_for_leaks)
            except TimeoutError:
                self.error = EngineHungError(f"the engine has taken no command for {hung_after_s:g} s")
                self.failed.set()
                return
            await asyncio.sleep(hung_after_s / _WATCHES)

    async def _in_engine(self, command: Callable[..., None], *args: Any) -> None:
        """Returns once the engine thread has run a command and all those before it."""
        done = asyncio.Event()

        def run() -> None:
            command(*args)
            self._loop.call_soon_threadsafe(done.set)

        self._thread.call(run)
        await done.wait()

    def _close(self) -> int:
        if isinstance(self.error, ConfigError):
            log.error("engine not configured", reason=str(self.error))
            lifecycle.notify_systemd(f"STATUS={one_line(self.error)}")
            return lifecycle.MISCONFIGURED
        if self.error is not None:
            log.error("engine failed", error=repr(self.error), exc_info=self.error)
            lifecycle.notify_systemd(f"STATUS={type(self.error).__name__}: {one_line(self.error)}")
            return lifecycle.FAILED
        self._thread.close(_STOP_S)
        return lifecycle.OK

    # ---- called on the loop ----------------------------------------------------------------------------------------

    def _info(self) -> WorkerInfo:
        return self._stage.info

    def _on_message(self, message: Message, frames: Frames) -> None:
        if isinstance(message, Pools):
            self._thread.call(self._stage.set_pools, message.pools)
        else:
            self._thread.call(self._stage.handle, message, frames)

    async def _on_registered(self, welcome: Welcome) -> None:
        self._thread.call(self._stage.set_pools, welcome.pools)
        if self._draining:
            self._link.send(Draining())

    async def _on_lost(self, reason: str) -> None:
        """Resets the engine; returns only afterwards, so that a worker with a stuck engine never registers again."""
        await self._in_engine(self._stage.reset)

    # ---- called in any thread --------------------------------------------------------------------------------------

    def _call(self, command: Callable[..., None], *args: Any) -> None:
        self._thread.call(command, *args)

    # ---- called in the engine thread -------------------------------------------------------------------------------

    def _post(self, message: Message, frames: Frames) -> None:
        self._loop.call_soon_threadsafe(self._link.send, message, frames)

    def _look_for_leaks(self) -> None:
        if not self._leaking.is_set() and (leak := self._stage.leak(time.monotonic())):
            log.error("this worker is to be replaced", reason=leak)
            self._loop.call_soon_threadsafe(self._leaking.set)

    def _on_ready(self) -> None:
        self._loop.call_soon_threadsafe(self._ready.set)

    def _on_thread_error(self, args: threading.ExceptHookArgs) -> None:
        """A thread of vLLM or NIXL has died; the engine would wait for it for ever."""
        name = args.thread.name if args.thread else "a thread"
        log.error("a thread of the engine died", thread=name, error=repr(args.exc_value))
        self._on_exit(RuntimeError(f"{name} died: {args.exc_value!r}"))

    def _on_exit(self, error: BaseException | None) -> None:
        self.error = error
        if error is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.failed.set)


async def main(config: Config, stage: str, name: str, life: Life) -> int:
    """Serves one worker until it is stopped; returns the exit status."""
    return await Worker(config, stage, name).serve(life)


def run(config: Config, stage: str, name: str) -> int:
    """Runs the daemon until SIGINT or SIGTERM; returns the exit status."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    status = lifecycle.run(config.log, name, lambda life: main(config, stage, name, life))
    if any(isinstance(thread, EngineThread) for thread in threading.enumerate()):
        os._exit(status)  # it is stuck, and the interpreter's end might wait for it
    return status

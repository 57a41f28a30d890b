"""A whole pipeline on this host: broker, cache, endpoint and workers, each a process.

Lives in the process of `epd up`, `epd demo`, a test or a benchmark; owns a `Supervisor` and its run directory.

Where the start-up time goes: importing vLLM takes seconds of CPU, once, in the zygote; meanwhile broker and cache
start as light processes of their own. Then endpoint and workers are forked and load, which is all that is done per
process.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import shutil
import signal
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from epd.config import Config, ConfigError, dump
from epd.local import dtype
from epd.local.daemon import Daemon, Spec, StartError, State, last_line
from epd.local.engine_options import checked
from epd.local.environment import free_ports, listen, make_run_directory, python, resolve_model
from epd.local.environment import set_engine_environment as set_environment
from epd.local.extras import ENGINE, need
from epd.local.supervisor import Supervisor

STAGES = ("encode", "prefill", "decode")
START_S = 600.0
_POLL_S = 0.02
_MISCONFIGURED = 2  # the exit status of a daemon whose configuration is invalid
_WORKER_STOP_S = 5.0  # beyond its time to drain

Progress = Callable[[Daemon], None]


class LocalPipeline:
    """Runs a pipeline while it is entered as an async context manager; it is ready when entered.

    Args:
        config: As for the daemons; without a model it is the built-in one. The broker's address is replaced by a
            socket in the run directory, and an endpoint port of 0 by a free one.
        encode: Number of encode workers, instead of `config.encode.workers`.
        prefill: Number of prefill workers.
        decode: Number of decode workers.
        progress: Called at each change of a daemon's state, on the event loop.
        restart: Start daemons again that crash, as systemd would.
        start_s: How long the start may take.

    Attributes:
        note: What was chosen for this host and the user should know; empty if nothing.

    Raises:
        ConfigError: vLLM is not installed, or the model or an engine option is not valid; on entering: the port.
        StartError: on entering: a daemon has ended, or it took longer than `start_s`.
    """

    def __init__(
        self,
        config: Config | None = None,
        *,
        encode: int | None = None,
        prefill: int | None = None,
        decode: int | None = None,
        progress: Progress = lambda _: None,
        restart: bool = False,
        start_s: float = START_S,
    ) -> None:
        need(ENGINE)
        config, self.note = dtype.for_this_host(copy.deepcopy(config) if config else Config())
        self.config = checked(resolve_model(config))
        for stage, count in zip(STAGES, (encode, prefill, decode), strict=True):
            if count is not None:
                getattr(self.config, stage).workers = count
        self._progress, self._restart, self._start_s = progress, restart, start_s
        self._supervisor: Supervisor | None = None
        self._changed = asyncio.Event()
        self.ready_s = 0.0
        self.imported_s = 0.0
        self.clean = False

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close(keep_logs=kind is not None)

    async def start(self) -> None:
        """Starts everything and returns when /ready answers 200; nothing is left if that fails.

        Raises:
            ConfigError, StartError: as on entering; a daemon found its configuration invalid.
        """
        started = time.monotonic()
        self._listening = listen(self.config.endpoint.host, self.config.endpoint.port)
        self.config.endpoint.port = self._listening.getsockname()[1]
        self.run_dir = make_run_directory()
        self.config.broker.address = f"ipc://{self.run_dir}/broker.sock"
        set_environment(self.config.model, self.config.log.level)
        (self.run_dir / "config.json").write_text(dump(self.config))
        self._supervisor = Supervisor(
            self.run_dir, preload=self._preload(), on_change=self._on_change, listening=self._listening
        )
        try:
            await self._start(started + self._start_s)
        except BaseException as error:
            await self.stop_now()
            # The user no longer wants it, or knows the reason: nobody will read the logs.
            if not isinstance(error, Exception) or isinstance(error, ConfigError):
                shutil.rmtree(self.run_dir, ignore_errors=True)
            raise
        self._supervisor.restart_crashed = self._restart
        self.ready_s = time.monotonic() - started

    async def close(self, *, keep_logs: bool = False) -> None:
        """Drains; removes the run directory if all went well and nobody needs the logs."""
        await self.drain()
        if self.clean and not keep_logs:
            await asyncio.to_thread(shutil.rmtree, self.run_dir, ignore_errors=True)

    @property
    def supervisor(self) -> Supervisor:
        """What runs the processes."""
        assert self._supervisor is not None, "enter the pipeline first"
        return self._supervisor

    @property
    def processes(self) -> dict[str, Daemon]:
        """All daemons by name: broker, cache, endpoint, encode-0, ..., prefill-0, ..., decode-0, ..."""
        return self.supervisor.daemons

    @property
    def url(self) -> str:
        """Where the endpoint listens."""
        host = self.config.endpoint.host
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host, host)
        return f"http://{host}:{self.config.endpoint.port}"

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Sends a daemon a signal; it is noticed like any other crash."""
        self.supervisor.kill(name, number)

    async def restart(self, name: str) -> Daemon:
        """Restarts a daemon that has ended; returns when it is ready.

        Raises:
            StartError: it ended again.
        """
        daemon = await self.supervisor.restart(name)
        await self._until(lambda: daemon.state is State.READY or daemon.exited.is_set())
        if daemon.exited.is_set():
            raise _start_error(daemon)
        return daemon

    async def roll(self, name: str) -> Daemon:
        """Lets a daemon finish and starts it again, as `systemctl restart` does; returns when it is ready.

        Raises:
            StartError: it ended again.
        """
        await self.supervisor.stop_one(name)
        return await self.restart(name)

    async def drain(self) -> bool:
        """Stops in order: the endpoint finishes what runs, then the workers, then broker and cache.

        May be called again: later calls only return the result.

        Returns:
            Whether every daemon ended by itself, with status 0.
        """
        self._listening.close()
        self.clean = await self.supervisor.stop()
        return self.clean

    async def stop_now(self) -> None:
        """Stops at once; current work is lost, but files and shared memory are tidied up."""
        self._listening.close()
        await self.supervisor.stop(at_once=True)

    async def call(self, name: str, target: str, args: list[Any]) -> Daemon:
        """Forks one more process from the zygote, which calls `target` ("module:function"), and waits for its end."""
        spec = Spec(name=name, role=name, target=target, args=args, stop_s=0.0, once=True)
        daemon = await self.supervisor.start(spec)
        await daemon.exited.wait()
        return daemon

    # ---- starting --------------------------------------------------------------------------------------------------

    async def _start(self, deadline: float) -> None:
        supervisor = self.supervisor
        starting = asyncio.create_task(self._start_all(), name="start-pipeline")
        ended = asyncio.create_task(supervisor.next_ended(), name="next-ended")
        try:
            async with asyncio.timeout_at(asyncio.get_running_loop().time() + deadline - time.monotonic()):
                await asyncio.wait({starting, ended}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                raise _start_error(ended.result())
            try:
                starting.result()
            except ExceptionGroup as group:
                raise StartError(f"{last_line(group.exceptions[0])}; logs in {self.run_dir}") from group
        except TimeoutError:
            missing = [d.name for d in supervisor.daemons.values() if d.state is not State.READY]
            what = f"not ready: {', '.join(missing)}" if missing else "the endpoint says that it is not ready"
            raise StartError(f"no pipeline within {self._start_s:g} s; {what}; logs in {self.run_dir}") from None
        finally:
            for task in (starting, ended):
                task.cancel()
            await asyncio.gather(starting, ended, return_exceptions=True)

    async def _start_all(self) -> None:
        """Starts everything as early as possible and returns when /ready answers 200."""
        supervisor = self.supervisor
        zygote = await supervisor.zygote()
        async with asyncio.TaskGroup() as tasks:
            for spec in self._specs():
                tasks.create_task(supervisor.start(spec), name=f"start-{spec.name}")
            tasks.create_task(self._wait_ready(), name="wait-ready")
        self.imported_s = zygote.imported.result()

    async def _wait_ready(self) -> None:
        """Returns when every daemon has said so and the endpoint agrees."""
        from epd.client import AsyncClient, EPDError

        await self._until(lambda: "endpoint" in self.processes)
        endpoint = self.processes["endpoint"]
        await self._until(lambda: endpoint.state is State.READY)
        await self._until(lambda: all(daemon.state is State.READY for daemon in self.processes.values()))
        async with AsyncClient(self.url) as client:
            while True:
                with contextlib.suppress(EPDError):
                    if await client.ready():
                        return
                await asyncio.sleep(_POLL_S)

    def _preload(self) -> dict[str, Any]:
        return {"modules": ["epd.local.preload"], "warm": [["epd.local.preload:warm", [dump(self.config)]]]}

    def _on_change(self, daemon: Daemon) -> None:
        self._changed.set()
        self._progress(daemon)

    async def _until(self, holds: Callable[[], bool]) -> None:
        """Returns once `holds` is true; it is asked at each change of a daemon."""
        while not holds():
            self._changed.clear()
            await self._changed.wait()

    def _specs(self) -> list[Spec]:
        """All daemons, the slowest to load first."""
        config_path = str(self.run_dir / "config.json")
        text = dump(self.config)
        specs = [
            Spec(
                name=role,
                role=role,
                argv=python("-m", "epd.cli", role, "--config", config_path, "--name", role),
                stop_rank=2,
                tidies=True,
            )
            for role in ("broker", "cache")
        ]
        workers = [(stage, index) for stage in reversed(STAGES) for index in range(getattr(self.config, stage).workers)]
        for (stage, index), port in zip(workers, free_ports(len(workers)), strict=True):
            name = f"{stage}-{index}"
            env = {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(port)}
            specs.append(
                Spec(
                    name=name,
                    role=stage,
                    target="epd.local.targets:worker",
                    args=[text, stage, name],
                    env=env,
                    stop_rank=1,
                    stop_s=getattr(self.config, stage).drain_s + _WORKER_STOP_S,
                )
            )
        specs.append(
            Spec(
                name="endpoint",
                role="endpoint",
                target="epd.local.targets:endpoint",
                args=[text, "endpoint"],
                listens=True,
                stop_rank=0,
                stop_s=self.config.endpoint.drain_s + 5.0,
            )
        )
        return specs


def _start_error(daemon: Daemon) -> StartError | ConfigError:
    """Why there is no pipeline: what the daemon that ended said (STATUS=), else the end of its log."""
    if daemon.status == _MISCONFIGURED and daemon.detail:
        return ConfigError(f"{daemon.name}: {daemon.detail}")
    said = f": {daemon.detail}" if daemon.detail else ""
    message = f"{daemon.name} {daemon.how_it_ended()} while the pipeline started{said}; its log: {daemon.log_path}"
    return StartError(message, daemon.name, [] if said else daemon.last_lines())

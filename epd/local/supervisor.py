"""Runs daemons as processes of this host: starts them, notices each end at once, restarts or stops them in order.

Lives in the process of `epd up`, `epd demo`, a test or a benchmark; owns all processes below it, their notify sockets
and the tasks that wait for them. It is to a pipeline what systemd is to units, and speaks systemd's notify
protocol with them. If this process is killed, the daemons end too: those that are separate processes get SIGTERM from
the kernel (`epd.process.service.die_with_parent`), those that the zygote forked get it from the zygote.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from epd.local.daemon import Daemon, Spec, State, last_line
from epd.local.environment import PARENT_PID, scratch_environment, sweep
from epd.local.forker import Forker, ZygoteError, signal_quietly

_BACKOFF_S, _MAX_BACKOFF_S, _STEADY_S = 0.5, 10.0, 30.0
_AT_ONCE_S = 1.5

OnChange = Callable[[Daemon], None]


class Supervisor:
    """Owns daemons while it is entered as an async context manager; leaving it stops them all.

    Args:
        run_dir: Logs and sockets go here.
        preload: What the zygote loads, see `epd.local.zygote`; daemons without `argv` are forked from it.
        on_change: Called at each change of a daemon's state.
        listening: A socket for the daemons that listen; it stays the caller's.

    Attributes:
        restart_crashed: Start daemons again that end without being asked to, after 0.5 s at first.
        max_backoff_s: How long one that ends again and again is waited with at most.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        preload: dict[str, Any],
        on_change: OnChange = lambda _: None,
        listening: socket.socket | None = None,
    ) -> None:
        self.run_dir, self._preload, self.on_change, self._listening = run_dir, preload, on_change, listening
        self.restart_crashed = False
        self.max_backoff_s = _MAX_BACKOFF_S
        self.daemons: dict[str, Daemon] = {}
        self.stopping = False
        self._forker: Forker | None = None
        self._forker_lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._notify: dict[str, socket.socket] = {}
        self._failures: dict[str, float] = {}
        self._ended: asyncio.Queue[Daemon] = asyncio.Queue()

    async def __aenter__(self) -> Self:
        await self.zygote()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop(at_once=kind is not None)

    async def zygote(self) -> Forker:
        """The zygote, started if there is none."""
        async with self._forker_lock:
            if self._forker is not None and not self._forker.alive:
                await self._forker.__aexit__(None, None, None)
                self._forker = None
            if self._forker is None:
                self._forker = await Forker(
                    self._preload,
                    self.run_dir,
                    on_exit=self._on_exit,
                    on_lost=self._on_zygote_lost,
                    listening=self._listening,
                ).__aenter__()
                for daemon in self.daemons.values():
                    if daemon.spec.argv and daemon.alive:
                        self._forker.watch(daemon.pid)
            return self._forker

    async def start(self, spec: Spec) -> Daemon:
        """Starts a daemon, perhaps one that has ended; returns as soon as there is a process.

        Raises:
            RuntimeError: it runs already.
            ZygoteError: it cannot be forked.
        """
        daemon = self.daemons.get(spec.name)
        if daemon is None:
            daemon = Daemon(spec=spec, log_path=self.run_dir / f"{spec.name}.log")
            self.daemons[spec.name] = daemon
        elif daemon.alive:
            raise RuntimeError(f"{spec.name} runs already")
        else:
            daemon.num_restarts += 1
        daemon.spec, daemon.pid, daemon.status, daemon.detail = spec, 0, None, ""
        daemon.exited.clear()
        env = spec.env | {"NOTIFY_SOCKET": self._notify_socket(daemon)}
        self._set(daemon, State.WAITING)
        if spec.argv:
            await self._start_process(daemon, env)
        else:
            forker = await self.zygote()
            await asyncio.shield(forker.imported)
            daemon.started_at = time.monotonic()
            daemon.pid = await forker.fork(spec, env, daemon.log_path)
        if daemon.state == State.WAITING:  # otherwise it is already ready, or has failed
            self._set(daemon, State.LOADING)
        return daemon

    async def stop_one(self, name: str) -> None:
        """Lets a daemon finish what it has (SIGTERM), and kills it if that takes too long; it stays stopped."""
        await self._stop_one(self.daemons[name], at_once=False)

    async def restart(self, name: str) -> Daemon:
        """Restarts a daemon that has ended."""
        return await self.start(self.daemons[name].spec)

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        """Sends a daemon a signal; if it ends and crashed daemons are restarted, it comes back."""
        daemon = self.daemons[name]
        if daemon.alive:
            signal_quietly(daemon.pid, number)

    async def next_ended(self) -> Daemon:
        """Returns the next daemon that ends without having been asked to."""
        return await self._ended.get()

    async def stop(self, *, at_once: bool = False) -> bool:
        """Stops all daemons in the order of their ranks, then the zygote, and sweeps. May be called again.

        Args:
            at_once: Do not let them finish.

        Returns:
            Whether every daemon ended by itself, with status 0.
        """
        self.stopping = True
        tasks = [*self._tasks]
        for task in tasks:
            if task.get_name().startswith("restart-"):
                task.cancel()
        for rank in sorted({daemon.spec.stop_rank for daemon in self.daemons.values()}):
            group = [d for d in self.daemons.values() if d.spec.stop_rank == rank and d.alive]
            await asyncio.gather(*(self._stop_one(daemon, at_once=at_once) for daemon in group))
        if self._forker is not None:
            forker, self._forker = self._forker, None
            await forker.__aexit__(None, None, None)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for sock in self._notify.values():
            asyncio.get_running_loop().remove_reader(sock)
            sock.close()
        self._notify.clear()
        await asyncio.to_thread(sweep, self.run_dir)
        return all(daemon.status == 0 for daemon in self.daemons.values())

    async def _stop_one(self, daemon: Daemon, *, at_once: bool) -> None:
        self._set(daemon, State.STOPPING)
        gentle_s = daemon.spec.stop_s
        if at_once:
            gentle_s = min(gentle_s, _AT_ONCE_S if daemon.spec.tidies else 0.0)
        if gentle_s:
            signal_quietly(daemon.pid, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(gentle_s):
                    await daemon.exited.wait()
        if daemon.alive:
            signal_quietly(daemon.pid, signal.SIGKILL)
            await daemon.exited.wait()

    async def _start_process(self, daemon: Daemon, env: dict[str, str]) -> None:
        daemon.started_at = time.monotonic()
        with daemon.log_path.open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *daemon.spec.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | scratch_environment(self.run_dir) | env | {PARENT_PID: str(os.getpid())},
                start_new_session=True,
            )
        daemon.pid = process.pid
        if self._forker is not None:
            self._forker.watch(process.pid)

        async def wait() -> None:
            status = await process.wait()
            if self._forker is not None:
                self._forker.unwatch(process.pid)
            self._on_exit(daemon.name, process.pid, status)

        self._own(wait(), f"wait-{daemon.name}")

    def _own(self, work: Any, name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _on_exit(self, name: str, pid: int, status: int) -> None:
        daemon = self.daemons[name]
        if daemon.exited.is_set() or daemon.pid not in (0, pid):
            return
        if name in self._notify:
            self._on_notify(daemon, self._notify[name])  # its last words
        daemon.pid, daemon.status = pid, status
        daemon.exited.set()
        asked = self.stopping or daemon.state == State.STOPPING or (daemon.spec.once and status == 0)
        self._set(daemon, State.STOPPED if asked else State.FAILED)
        if asked:
            return
        self._ended.put_nowait(daemon)
        if self.restart_crashed and not daemon.spec.once:
            self._own(self._start_again(daemon), f"restart-{name}")

    async def _start_again(self, daemon: Daemon) -> None:
        lived_s = time.monotonic() - daemon.started_at
        previous_s = 0.0 if lived_s > _STEADY_S else self._failures.get(daemon.name, 0.0)
        wait_s = min(self.max_backoff_s, 2 * previous_s or _BACKOFF_S)
        self._failures[daemon.name] = wait_s
        await asyncio.sleep(wait_s)
        if self.stopping or daemon.alive:
            return
        try:
            await self.restart(daemon.name)
        except (ZygoteError, OSError) as error:
            daemon.detail = last_line(error)
            self._set(daemon, State.FAILED)
            self._own(self._start_again(daemon), f"restart-{daemon.name}")

    def _on_zygote_lost(self) -> None:
        for daemon in self.daemons.values():
            if not daemon.spec.argv and daemon.alive:
                signal_quietly(daemon.pid, signal.SIGKILL)  # the kernel has done so already
                self._on_exit(daemon.name, daemon.pid, -signal.SIGKILL)

    def _mark_ready(self, daemon: Daemon) -> None:
        if daemon.state in (State.WAITING, State.LOADING):
            daemon.took_s = time.monotonic() - daemon.started_at
            self._set(daemon, State.READY)

    def _set(self, daemon: Daemon, state: State) -> None:
        daemon.state = state
        self._tell(daemon)

    def _tell(self, daemon: Daemon) -> None:
        with contextlib.suppress(Exception):  # an observer's error must not keep daemons from being stopped
            self.on_change(daemon)

    def _notify_socket(self, daemon: Daemon) -> str:
        path = self.run_dir / f"{daemon.name}.notify.sock"
        if daemon.name not in self._notify:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            sock.setblocking(False)
            sock.bind(str(path))
            self._notify[daemon.name] = sock
            asyncio.get_running_loop().add_reader(sock, self._on_notify, daemon, sock)
        return str(path)

    def _on_notify(self, daemon: Daemon, sock: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                for line in sock.recv(8192).decode("utf-8", "replace").splitlines():
                    key, _, value = line.partition("=")
                    if key == "STATUS":
                        daemon.detail = value
                        self._tell(daemon)
                    elif key == "READY":
                        self._mark_ready(daemon)

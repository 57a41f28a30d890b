"""The zygote: a process that has imported vLLM once and forks every daemon that needs it.

Lives in a process of its own, started by `epd.local.forker` as
`python -m epd.local.zygote FD RUN_DIR PRELOAD`,
where PRELOAD is JSON: `{"modules": [...], "warm": [["module:function", [argument, ...]], ...]}`.
It owns the processes it forks: it reports their ends, and when its supervisor is gone it ends them, sweeps what they
left and goes too. It runs no thread and no event loop, because a fork keeps only the thread that called it.

Both directions of the socket FD carry lines of JSON.

In: `{"op": "fork", "name", "target", "args", "env", "log", "listens"}`, with `target` as "module:function" and
`listens` for the one that keeps the zygote's listening socket (`epd.process.activation`);
`{"op": "watch", "pid"}` and `{"op": "unwatch", "pid"}` for processes of the supervisor's own that must not outlive it.

Out: `{"event": "imported", "took_s", "num_threads"}`, `{"event": "failed", "message"}`,
`{"event": "forked", "name", "pid"}`, `{"event": "exited", "name", "pid", "status"}`.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from epd.local.environment import ORPHANED_S, sweep, title
from epd.process.activation import LISTEN_FD
from epd.process.service import die_with_parent

_MAX_LINE = 4 << 20


class Zygote:
    """The loop that forks and reaps.

    Args:
        sock: connected to the supervisor.
        run_dir: swept when the supervisor has died.
    """

    def __init__(self, sock: socket.socket, run_dir: Path) -> None:
        self._sock, self._run_dir = sock, run_dir
        self._names: dict[int, str] = {}
        self._watched: dict[int, int] = {}  # pid -> pidfd
        self._buffer = b""
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def run(self, preload: dict[str, Any]) -> int:
        """Loads what PRELOAD says, then serves until the supervisor is gone."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the supervisor's business
        die_with_parent(signal.SIGKILL)  # while importing, nobody reads the socket, and there is nothing to end
        started = time.perf_counter()
        try:
            load_all(preload)
        except BaseException:
            traceback.print_exc()
            self._send(event="failed", message=traceback.format_exc())
            return 1
        die_with_parent(0)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        num_threads = len(os.listdir("/proc/self/task"))
        self._send(event="imported", took_s=time.perf_counter() - started, num_threads=num_threads)
        while self._serve_once():
            pass
        self._end_children()
        sweep(self._run_dir)
        return 0

    def _serve_once(self) -> bool:
        """Waits for a command or a child's end and handles it. Returns whether the supervisor is still there."""
        waited_for: list[Any] = [self._sock, self._wake_read]
        readable, _, _ = select.select(waited_for, [], [])
        if self._wake_read in readable:
            with contextlib.suppress(BlockingIOError):
                os.read(self._wake_read, 4096)
            self._reap()
        if self._sock not in readable:
            return True
        try:
            data = self._sock.recv(1 << 16)
        except ConnectionError:
            return False
        self._buffer += data
        while b"\n" in self._buffer:
            line, self._buffer = self._buffer.split(b"\n", 1)
            self._handle(json.loads(line))
        return bool(data) and len(self._buffer) < _MAX_LINE

    def _handle(self, command: dict[str, Any]) -> None:
        match command["op"]:
            case "fork":
                self._fork(command)
            case "watch":
                with contextlib.suppress(ProcessLookupError):
                    self._watched[command["pid"]] = os.pidfd_open(command["pid"])
            case "unwatch":
                if (descriptor := self._watched.pop(command["pid"], None)) is not None:
                    os.close(descriptor)

    def _fork(self, command: dict[str, Any]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            self._become(command)
        self._names[pid] = command["name"]
        self._send(event="forked", name=command["name"], pid=pid)

    def _become(self, command: dict[str, Any]) -> None:
        """Turns the forked child into the daemon; never returns."""
        status = 70
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            parent = os.getppid()
            die_with_parent(signal.SIGKILL)  # normally the zygote ends last: this is in case it is killed
            if os.getppid() != parent:
                os._exit(1)
            self._sock.close()
            for descriptor in (self._wake_read, self._wake_write, *self._watched.values()):
                os.close(descriptor)
            log = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.close(log)
            if not command["listens"] and (listening := os.environ.pop(LISTEN_FD, "")):
                os.close(int(listening))
            os.environ.update(command["env"])
            atexit._clear()  # the zygote's
            _fresh_seeds()
            faulthandler.enable()
            title(f"epd {command['name']}")
            # vLLM unfreezes and collects when an engine stops, which would copy all shared pages and take seconds.
            setattr(gc, "unfreeze", lambda: None)  # noqa: B010 - mypy does not let functions be assigned
            gc.enable()
            status = call(command["target"], command["args"])
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                atexit._run_exitfuncs()
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)

    def _reap(self) -> None:
        while self._names:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            name = self._names.pop(pid, "")
            self._send(event="exited", name=name, pid=pid, status=os.waitstatus_to_exitcode(status))

    def _send(self, **event: Any) -> None:
        with contextlib.suppress(OSError):  # the supervisor is gone: the loop will notice
            self._sock.sendall(json.dumps(event).encode() + b"\n")

    def _end_children(self) -> None:
        deadline = time.monotonic() + ORPHANED_S
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in self._names:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            while self._names and (number == signal.SIGKILL or time.monotonic() < deadline):
                self._reap()
                select.select([self._wake_read], [], [], 0.05)
        for descriptor in self._watched.values():  # they have got SIGTERM from the kernel
            if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                select.select([descriptor], [], [], 1.0)


def load_all(preload: dict[str, Any]) -> None:
    """Imports the modules and makes the calls of `preload`, out of the garbage collector's reach for good.

    Without the collector, which would look at millions of new objects in vain, importing vLLM takes a quarter less
    time. Later it leaves frozen objects alone, so that their pages stay shared between all forks.
    """
    gc.disable()
    for module in preload.get("modules", ()):
        importlib.import_module(module)
    for target, args in preload.get("warm", ()):
        call(target, args)
    gc.collect()
    gc.freeze()


def call(target: str, args: list[Any]) -> int:
    """Calls `target` ("module:function") with `args` and returns its exit status."""
    module, _, function = target.partition(":")
    return int(getattr(importlib.import_module(module), function)(*args) or 0)


def _fresh_seeds() -> None:
    """Gives libraries that were imported before the fork new seeds; `random` does so by itself."""
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()
    if torch := sys.modules.get("torch"):
        torch.seed()


def main(argv: list[str]) -> int:
    """`FD RUN_DIR PRELOAD`, see the module."""
    title("epd zygote")
    sock = socket.socket(fileno=int(argv[0]))
    sock.set_inheritable(False)
    return Zygote(sock, Path(argv[1])).run(json.loads(argv[2]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A peer's link to the broker: one DEALER socket, registration, heartbeats, and starting over when the broker is lost.

Lives in every process but the broker; owns the socket and the tasks that read it, write it and keep it alive. The
routing id of the socket is the peer's incarnation: each registration opens a new socket with a new one, so that
whatever was on its way to an earlier incarnation is never delivered to this one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

import structlog
import zmq
import zmq.asyncio

from epd import wire
from epd.messages import Goodbye, Heartbeat, HeartbeatAck, Hello, Message, Pool, Role, Unknown, Welcome, WorkerInfo

log = structlog.get_logger()

MAX_OUTBOX = 65_536
_HELLO_EVERY_S = 0.5
_GOODBYE_S = 1.0

OnMessage = Callable[[Message, list[bytes]], None]
OnRegistered = Callable[[Welcome], Awaitable[None]]
OnLost = Callable[[str], Awaitable[None]]


class LinkOverloadedError(RuntimeError):
    """More than `MAX_OUTBOX` messages wait to be sent: the broker does not keep up."""


class BrokerLink:
    """Keeps one peer registered with the broker while it is entered as an async context manager.

    Args:
        address: the broker's ZeroMQ address.
        name: this peer's name, stable across its restarts.
        role: what it does.
        info: called at each registration.
        pools: called at each registration (cache daemons).
        on_message: called with each message after WELCOME, on the event loop, never concurrently.
        on_registered: awaited after each WELCOME.
        on_lost: awaited when a registration has ended (the broker restarted or fell silent); everything held for the
            broker is to be dropped. Registration then starts again by itself.
        steps: the number of engine steps, sent with each heartbeat.
    """

    def __init__(
        self,
        address: str,
        name: str,
        role: Role,
        *,
        on_message: OnMessage,
        info: Callable[[], WorkerInfo] = WorkerInfo,
        pools: Callable[[], list[Pool]] = list,
        on_registered: OnRegistered | None = None,
        on_lost: OnLost | None = None,
        steps: Callable[[], int] = int,
    ) -> None:
        self._address, self._name, self._role = address, name, role
        self._info, self._pools, self._steps = info, pools, steps
        self._on_message, self._on_registered, self._on_lost = on_message, on_registered, on_lost
        self._context = zmq.asyncio.Context()
        self._outbox: asyncio.Queue[list[bytes]] = asyncio.Queue(MAX_OUTBOX)
        self._registered = asyncio.Event()
        self._heard_at = 0.0
        self._task: asyncio.Task[None] | None = None
        self._ended: str | None = None
        self._leaving = False
        self.incarnation = ""

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._keep_registered(), name=f"link-{self._name}")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._context.destroy(linger=200)

    @property
    def registered(self) -> bool:
        """Whether the broker has welcomed the present incarnation."""
        return self._registered.is_set()

    async def wait_registered(self) -> None:
        """Returns once the broker has welcomed this peer."""
        await self._registered.wait()

    def send(self, message: Message, frames: wire.Frames = ()) -> None:
        """Queues a message for the broker; without a registration it is dropped, as its state is gone there.

        Raises:
            LinkOverloadedError: `MAX_OUTBOX` messages wait already.
        """
        if not self.registered:
            return
        try:
            self._outbox.put_nowait(wire.encode(message, frames))
        except asyncio.QueueFull:
            raise LinkOverloadedError(f"{MAX_OUTBOX} messages wait for the broker") from None

    async def goodbye(self, reason: str) -> None:
        """Says GOODBYE after all that was sent before, and waits (a second at most) until ZeroMQ has it.

        This peer does not register again.
        """
        self._leaving = True
        if self.registered:
            self.send(Goodbye(reason=reason))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._outbox.join(), _GOODBYE_S)

    async def _keep_registered(self) -> None:
        while not self._leaving:
            self.incarnation = secrets.token_hex(8)
            sock: zmq.asyncio.Socket = self._context.socket(zmq.DEALER)
            sock.setsockopt(zmq.IDENTITY, self.incarnation.encode())
            sock.setsockopt(zmq.LINGER, 200)
            sock.setsockopt(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
            sock.setsockopt(zmq.SNDHWM, 0)
            sock.setsockopt(zmq.RCVHWM, 0)
            sock.connect(self._address)
            try:
                welcome = await self._register(sock)
                await self._serve(sock, welcome)
            finally:
                self._registered.clear()
                sock.close()
            if self._leaving:
                return
            reason = self._ended or "the link ended"
            log.warning("broker lost", peer=self._name, reason=reason)
            if self._on_lost:
                await self._on_lost(reason)

    async def _register(self, sock: zmq.asyncio.Socket) -> Welcome:
        hello = Hello(
            name=self._name,
            role=self._role,
            incarnation=self.incarnation,
            host=socket.gethostname(),
            pid=os.getpid(),
            info=self._info(),
            pools=self._pools(),
        )
        sayer = asyncio.create_task(self._say_hello(sock, hello), name=f"hello-{self._name}")
        try:
            while True:
                message, _ = wire.decode(await sock.recv_multipart())
                if isinstance(message, Welcome):
                    return message
        finally:
            sayer.cancel()

    async def _say_hello(self, sock: zmq.asyncio.Socket, hello: Hello) -> None:
        parts = wire.encode(hello)
        while True:
            await sock.send_multipart(parts)
            await asyncio.sleep(_HELLO_EVERY_S)

    async def _serve(self, sock: zmq.asyncio.Socket, welcome: Welcome) -> None:
        while not self._outbox.empty():
            self._outbox.get_nowait()
            self._outbox.task_done()
        self._ended, self._heard_at = None, time.monotonic()
        self._registered.set()
        if self._on_registered:
            await self._on_registered(welcome)
        tasks = [
            asyncio.create_task(self._read(sock), name=f"read-{self._name}"),
            asyncio.create_task(self._write(sock), name=f"write-{self._name}"),
            asyncio.create_task(self._beat(welcome), name=f"beat-{self._name}"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, sock: zmq.asyncio.Socket) -> None:
        while True:
            parts = await sock.recv_multipart()
            self._heard_at = time.monotonic()
            try:
                message, frames = wire.decode(parts)
            except wire.WireError as error:
                log.warning("malformed message from the broker", reason=str(error))
                continue
            match message:
                case HeartbeatAck() | Welcome():
                    pass
                case Unknown():
                    self._ended = "the broker does not know this incarnation"
                    return
                case _:
                    self._on_message(message, frames)

    async def _write(self, sock: zmq.asyncio.Socket) -> None:
        while True:
            await sock.send_multipart(await self._outbox.get())
            self._outbox.task_done()

    async def _beat(self, welcome: Welcome) -> None:
        while True:
            await asyncio.sleep(welcome.heartbeat_s)
            if self._leaving:
                return
            self.send(Heartbeat(num_steps=self._steps()))
            silent_s = time.monotonic() - self._heard_at
            if silent_s > welcome.lost_after_s:
                self._ended = f"the broker was silent for {silent_s:.1f} s"
                return

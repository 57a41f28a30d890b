"""A peer's link to the broker: one DEALER socket, registration, heartbeats, and starting over when the broker is lost.

Lives in every process but the broker; owns the socket and the task that keeps it registered. The routing id of the
socket is the peer's incarnation: each registration opens a new socket with a new one, so that what was under way to
an earlier incarnation is never delivered to this one.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

import structlog
import zmq

from epd.messages import (
    Goodbye,
    Heartbeat,
    HeartbeatAck,
    Hello,
    Kind,
    Message,
    Pool,
    Stage,
    Unknown,
    Welcome,
    Work,
    WorkerInfo,
)
from epd.process import resources
from epd.process.hosts import this_host
from epd.transport import wire
from epd.transport.factory import SocketFactory
from epd.transport.sockets import MessageSocket

log = structlog.get_logger()

MAX_OUTBOX = 65_536
_HELLO_EVERY_S = 0.5

OnMessage = Callable[[Message, list[bytes]], None]
OnRegistered = Callable[[Welcome], Awaitable[None]]
OnLost = Callable[[str], Awaitable[None]]


class LinkOverloadedError(RuntimeError):
    """`MAX_OUTBOX` messages are waiting to be sent: the broker does not keep up."""


class BrokerLink:
    """Keeps one peer registered with the broker while it is entered as an async context manager.

    Args:
        address: the broker's ZeroMQ address.
        name: this peer's name, stable across its restarts.
        kind: what it is.
        stage: the stage that a worker serves, called at each registration; None for others.
        info: called at each registration.
        pools: called at each registration (cache daemons).
        on_message: called with each message after WELCOME, on the event loop, never concurrently.
        on_registered: awaited after each WELCOME, and done before `on_message` is called.
        on_lost: awaited when a registration has ended (the broker restarted or fell silent); must drop everything held
            for the broker. Then registration starts again by itself.
        steps: the number of engine steps, sent with each heartbeat.
        held: what this process holds, sent with each heartbeat too.
        work: what a worker's engine has done, likewise.
        gauges: what it tells of itself for metrics, likewise.
    """

    def __init__(
        self,
        address: str,
        name: str,
        kind: Kind,
        *,
        on_message: OnMessage,
        info: Callable[[], WorkerInfo] = WorkerInfo,
        pools: Callable[[], list[Pool]] = list,
        on_registered: OnRegistered | None = None,
        on_lost: OnLost | None = None,
        steps: Callable[[], int] = int,
        held: Callable[[], dict[str, int]] = resources.of_process,
        stage: Callable[[], Stage | None] = lambda: None,
        work: Callable[[], Work] = Work,
        gauges: Callable[[], dict[str, float]] = dict,
    ) -> None:
        self._address, self._name, self._kind, self._stage, self._work = address, name, kind, stage, work
        self._info, self._pools, self._steps = info, pools, steps
        self._held, self._gauges = held, gauges
        self._on_message, self._on_registered, self._on_lost = on_message, on_registered, on_lost
        self._sockets = SocketFactory()
        self._socket: MessageSocket | None = None
        self._welcome: asyncio.Future[Welcome] | None = None
        self._registered = asyncio.Event()
        self._lost: asyncio.Future[str] | None = None
        self._early: list[tuple[Message, list[bytes]]] = []
        self._heard_at = 0.0
        self._task: asyncio.Task[None] | None = None
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
        self._sockets.close()

    @property
    def registered(self) -> bool:
        """Whether the broker has welcomed the current incarnation."""
        return self._registered.is_set()

    async def wait_registered(self) -> None:
        """Returns once the broker has welcomed this peer."""
        await self._registered.wait()

    def send(self, message: Message, frames: wire.Frames = ()) -> None:
        """Sends a message to the broker; without a registration it is dropped, as the broker's state is gone.

        Raises:
            LinkOverloadedError: `MAX_OUTBOX` messages are already waiting.
        """
        if not self.registered or self._socket is None:
            return
        try:
            self._socket.send(wire.encode(message, frames))
        except zmq.Again:
            raise LinkOverloadedError(f"{MAX_OUTBOX} messages are waiting for the broker") from None

    def goodbye(self, reason: str) -> None:
        """Says GOODBYE after everything that was sent before; this peer does not register again."""
        self.send(Goodbye(reason=reason))
        self._leaving = True

    # ---- registration ----------------------------------------------------------------------------------------------

    async def _keep_registered(self) -> None:
        while True:
            reason = await self._one_registration()
            if self._leaving:
                return
            log.warning("broker lost", peer=self._name, reason=reason)
            if self._on_lost:
                await self._on_lost(reason)

    async def _one_registration(self) -> str:
        """Registers a new incarnation and keeps it alive; returns why that ended."""
        loop = asyncio.get_running_loop()
        self._welcome, self._lost, self._early = loop.create_future(), loop.create_future(), []
        self.incarnation = secrets.token_hex(8)
        sock = self._sockets.connect_dealer(self._address, routing_id=self.incarnation.encode(), max_sent=MAX_OUTBOX)
        self._socket = MessageSocket(sock, self._on_parts)
        try:
            welcome = await self._say_hello(self._socket, self._welcome)
            self._heard_at = time.monotonic()
            self._registered.set()
            if self._on_registered:
                await self._on_registered(welcome)
            early, self._early, self._welcome = self._early, [], None
            for message, frames in early:
                self._on_message(message, frames)
            return await self._beat(welcome, self._lost)
        finally:
            self._registered.clear()
            self._socket.close()
            self._socket = None

    async def _say_hello(self, sock: MessageSocket, welcome: asyncio.Future[Welcome]) -> Welcome:
        hello = Hello(
            name=self._name,
            kind=self._kind,
            stage=self._stage(),
            incarnation=self.incarnation,
            host=this_host(),
            pid=os.getpid(),
            info=self._info(),
            pools=self._pools(),
        )
        while True:
            sock.send(wire.encode(hello))
            done, _ = await asyncio.wait({welcome}, timeout=_HELLO_EVERY_S)
            if done:
                return welcome.result()

    async def _beat(self, welcome: Welcome, lost: asyncio.Future[str]) -> str:
        while True:
            done, _ = await asyncio.wait({lost}, timeout=welcome.heartbeat_s)
            if done:
                return lost.result()
            if not self._leaving:
                heartbeat = Heartbeat(
                    num_steps=self._steps(), held=self._held(), work=self._work(), gauges=self._gauges()
                )
                self.send(heartbeat)
            silent_s = time.monotonic() - self._heard_at
            if silent_s > welcome.lost_after_s:
                return f"the broker was silent for {silent_s:.1f} s"

    def _on_parts(self, parts: list[bytes]) -> None:
        self._heard_at = time.monotonic()
        try:
            message, frames = wire.decode(parts)
        except wire.WireError as error:
            log.warning("malformed message from the broker", reason=str(error))
            return
        match message:
            case HeartbeatAck():
                pass
            case Welcome():
                if self._welcome is not None and not self._welcome.done():
                    self._welcome.set_result(message)
            case Unknown():
                if self.registered and self._lost is not None and not self._lost.done():
                    self._lost.set_result("the broker does not know this incarnation")
            case _ if self._welcome is not None:
                self._early.append((message, frames))
            case _:
                self._on_message(message, frames)

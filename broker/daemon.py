"""The broker daemon: one loop that owns the ROUTER socket and sends what the decision core decides.

Lives in a process of its own; owns the socket, the clock and the flight recorder. It reads headers only and forwards
opaque frames untouched. A malformed message is counted, logged at most once a second, and affects only its sender. With
`broker.record` everything that the core sees is recorded (`broker.recording`).
"""

from __future__ import annotations

import asyncio
import time

import structlog
import zmq

from broker.core.core import Core
from broker.core.outbox import Send
from broker.recording.recorder import Recorder
from epd.config import Config, ConfigError
from epd.process import lifecycle, resources
from epd.process.lifecycle import Life
from epd.transport import wire
from epd.transport.factory import UNBOUNDED, AddressError, SocketFactory, address_of
from epd.transport.sockets import MessageSocket

log = structlog.get_logger()

TICK_S = 0.25
NUM_READ = 3  # routing id, prefix, header: the rest is opaque


class Broker:
    """Binds its socket at construction; `serve` runs until it is cancelled.

    Args:
        config: `config.broker` says where to bind; a TCP port of 0 picks a free one, see `address`.

    Raises:
        ConfigError: it cannot listen there, or cannot record to the given folder.
    """

    def __init__(self, config: Config) -> None:
        # Generations start at the time in microseconds: no earlier broker of the same pools can have got that far.
        first_generation = time.time_ns() // 1000
        epoch_s = time.time() - time.monotonic()
        self.core = Core(config.broker, first_generation, epoch_s)
        self._sockets = SocketFactory()
        try:
            self._bound = self._sockets.bind_router(config.broker.address, max_waiting=UNBOUNDED)
        except AddressError:
            self._sockets.close()
            raise
        self.address = address_of(self._bound)
        self._recorder: Recorder | None = None
        if config.broker.record:
            try:
                self._recorder = Recorder(
                    config.broker.record, config.broker.record_bytes, config.broker, first_generation, epoch_s
                )
            except OSError as error:
                self._sockets.close()
                raise ConfigError(f"broker.record {config.broker.record}: {error.strerror or error}") from None
            log.info("recording", file=str(self._recorder.path))
        self._socket: MessageSocket | None = None
        self.num_malformed = 0
        self._complained_at = 0.0

    async def serve(self) -> None:
        """Handles messages and the passage of time, for ever."""
        self._socket = MessageSocket(self._bound, self._handle, NUM_READ)
        try:
            while True:
                await asyncio.sleep(TICK_S)
                now, process_held = time.monotonic(), resources.of_process()
                self.core.status_board.process_held = process_held
                sends = self.core.tick(now)
                if self._recorder:
                    self._recorder.tick(now, process_held, sends)
                self._perform(sends)
        finally:
            self._socket.close()
            if self._recorder:
                self._recorder.close()

    def close(self) -> None:
        """Closes the socket; after `serve` has ended."""
        self._sockets.close()

    def _handle(self, parts: list[bytes]) -> None:
        peer_id = parts[0].decode("latin-1")  # any bytes, and back
        try:
            message, frames = wire.decode(parts[1:])
        except wire.WireError as error:
            self._complain(peer_id, str(error))
            return
        now = time.monotonic()
        try:
            sends = self.core.handle(peer_id, message, frames, now)
        except Exception:  # a bug in the core; one request's message must not end all others
            log.exception("not handled", peer=peer_id, command=type(message).__name__)
            sends = self.core.take()
        if self._recorder:
            self._recorder.message(now, peer_id, parts[1:], sends)
        self._perform(sends)

    def _perform(self, sends: list[Send]) -> None:
        assert self._socket is not None
        for peer_id, message, frames in sends:
            try:
                self._socket.send([peer_id.encode("latin-1"), *wire.encode(message, frames)])
            except zmq.ZMQError as error:  # the peer is gone; its silence will tell the core
                log.debug("not sent", peer=peer_id, command=type(message).__name__, reason=str(error))

    def _complain(self, peer_id: str, reason: str) -> None:
        self.num_malformed += 1
        if (now := time.monotonic()) - self._complained_at > 1.0:
            self._complained_at = now
            log.warning("malformed message", peer=peer_id, reason=reason, num_malformed=self.num_malformed)


async def main(config: Config, name: str, life: Life) -> int:
    """Serves until it is stopped; returns the exit status."""
    broker = Broker(config)
    log.info("listening", name=name, address=broker.address)
    life.ready()
    try:
        await life.end(broker.serve())
    finally:
        broker.close()
    return lifecycle.OK


def run(config: Config, name: str) -> int:
    """Runs the daemon until SIGINT or SIGTERM; returns the exit status."""
    return lifecycle.run(config.log, name, lambda life: main(config, name, life))

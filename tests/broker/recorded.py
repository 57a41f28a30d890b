"""A decision core that records what it sees, as the daemon does, and the replay of it."""

from __future__ import annotations

from pathlib import Path

from broker.core.core import Core
from broker.core.outbox import Send
from broker.recording.recorder import Recorder
from broker.recording.replay import Replayed, replay
from epd.config import BrokerConfig
from epd.messages import Message
from epd.transport import wire


class RecordedCore(Core):
    def __init__(self, config: BrokerConfig, folder: Path, max_bytes: int = 1 << 30) -> None:
        super().__init__(config)
        self.recorder = Recorder(str(folder), max_bytes, config, 1)
        self.num_messages = 0

    def handle(self, peer_id: str, message: Message, frames: list[bytes], now: float) -> list[Send]:
        self.num_messages += 1
        sends = super().handle(peer_id, message, frames, now)
        self.recorder.message(now, peer_id, wire.encode(message, frames), sends)
        return sends

    def tick(self, now: float) -> list[Send]:
        self.status_board.process_held = {"fds": round(now * 4)}  # as the daemon, which looks before each tick
        sends = super().tick(now)
        self.recorder.tick(now, self.status_board.process_held, sends)
        return sends

    def replayed(self) -> Replayed:
        """What the recording so far comes to."""
        self.recorder.close()
        with self.recorder.path.open("rb") as file:
            return replay(file)

"""The flight recorder: appends what the decision core sees to a file, so that `replay` can repeat it.

Lives in the broker daemon; owns the file. A file is a sequence of MessagePack values: first a map that says how the
core was made (`HEAD_FIELDS`), then an array for each event:

    [now, peer id, prefix, header, sizes of the frames, digest of what was sent]    a message
    [now, what the process holds, digest of what was sent]                          time has passed

Frames (pixels, prompts) are not recorded, only their sizes; headers have patch hashes, times and the ids of sampled
tokens. A failed write ends the recording and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import structlog

from broker.core.outbox import Send
from epd import __version__
from epd.config import BrokerConfig
from epd.transport import wire

log = structlog.get_logger()

FORMAT = 2
HEAD_FIELDS = ("format", "version", "began", "config", "first_generation", "epoch_s")
SUFFIX = ".mpk"
_BUFFER_BYTES = 1 << 20


def digest(sends: Iterable[Send]) -> int:
    """A number that differs if other messages were sent, or to other peers, or in another order."""
    value = 0
    for peer_id, message, frames in sends:
        prefix, header, *rest = wire.encode(message, frames)
        for part in (peer_id.encode(), prefix, header, msgspec.msgpack.encode([len(frame) for frame in rest])):
            value = zlib.crc32(part, value)
    return value


class Recorder:
    """Appends to a new file in `folder`; removes the oldest earlier files while all have more than `max_bytes`.

    Args:
        folder: where the file goes; it is made if it does not exist.
        max_bytes: the recording ends at that size: later events could not be replayed without the earlier ones.
        config: what the core was made with.
        first_generation: likewise.
        epoch_s: likewise.

    Raises:
        OSError: no file can be made there.
    """

    def __init__(
        self, folder: str, max_bytes: int, config: BrokerConfig, first_generation: int, epoch_s: float = 0.0
    ) -> None:
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        _make_room(path, max_bytes)
        self.path = path / f"broker-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{os.getpid()}{SUFFIX}"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._file = os.fdopen(descriptor, "wb", buffering=_BUFFER_BYTES)
        self._packer = msgpack.Packer()
        self._left = max_bytes
        began = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        head = (FORMAT, __version__, began, msgspec.to_builtins(config), first_generation, epoch_s)
        self._write(dict(zip(HEAD_FIELDS, head, strict=True)))
        self._flush()

    def message(self, now: float, peer_id: str, parts: Sequence[bytes], sends: Iterable[Send]) -> None:
        """Records a message, as the frames that came (`epd.transport.wire`), and what the core sent for it."""
        if not self._file.closed:
            prefix, header, *frames = parts
            self._write([now, peer_id, prefix, header, [len(frame) for frame in frames], digest(sends)])

    def tick(self, now: float, process_held: Mapping[str, int], sends: Iterable[Send]) -> None:
        """Records that time has passed, and writes what was recorded before to the file."""
        if self._file.closed:
            return
        self._write([now, dict(process_held), digest(sends)])
        self._flush()

    def close(self) -> None:
        """Closes the file."""
        try:
            self._file.close()
        except OSError as error:
            log.warning("flight recorder not closed", file=str(self.path), reason=str(error))

    def _write(self, record: Any) -> None:
        data = self._packer.pack(record)
        self._left -= len(data)
        if self._left < 0:
            self._stop("broker.record_bytes have been written")
            return
        try:
            self._file.write(data)
        except OSError as error:
            self._stop(str(error))

    def _flush(self) -> None:
        """Writes to the file; a full disk must neither keep the broker from starting nor stop it."""
        try:
            if not self._file.closed:
                self._file.flush()
        except OSError as error:
            self._stop(str(error))

    def _stop(self, reason: str) -> None:
        log.warning("flight recorder stopped", file=str(self.path), reason=reason)
        with contextlib.suppress(OSError):
            self._file.close()


def _make_room(folder: Path, max_bytes: int) -> None:
    files = sorted(folder.glob(f"broker-*{SUFFIX}"))
    total = sum(file.stat().st_size for file in files)
    for file in files:
        if total <= max_bytes:
            return
        total -= file.stat().st_size
        file.unlink()

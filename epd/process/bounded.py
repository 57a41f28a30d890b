"""Two small bounded collections: a cache that counts bytes, and a set of recently used names.

Lives in the endpoint process; pure. Both are used on the event loop only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Generic, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class ByteCache(Generic[K, V]):
    """Keeps the most recently used values, up to `max_bytes`; a value that is larger by itself is not kept."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K) -> V | None:
        """The value, which now counts as used; None if there is none."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: K, value: V, num_bytes: int) -> None:
        """Keeps `value`; the least recently used give way."""
        self.drop(key)
        if num_bytes > self._max_bytes:
            return
        self._entries[key] = (value, num_bytes)
        self.num_bytes += num_bytes
        while self.num_bytes > self._max_bytes:
            _, (_, freed) = self._entries.popitem(last=False)
            self.num_bytes -= freed

    def drop(self, key: K) -> None:
        """Forgets `key`, if it is there."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.num_bytes -= entry[1]


class Beliefs:
    """The patches that this endpoint believes to be in the broker's cache: the last `keep` of them.

    A belief may be wrong: then the broker answers `pixels_needed`, and it is forgotten.
    """

    def __init__(self, keep: int = 65_536) -> None:
        self._keep = keep
        self._names: OrderedDict[str, None] = OrderedDict()

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __len__(self) -> int:
        return len(self._names)

    def add(self, names: Iterable[str]) -> None:
        """Adds patches that are there: they were uploaded, or a request with them has given its first token."""
        for name in names:
            self._names[name] = None
            self._names.move_to_end(name)
        while len(self._names) > self._keep:
            self._names.popitem(last=False)

    def forget(self, names: Iterable[str]) -> None:
        """Forgets patches that may be gone."""
        for name in names:
            self._names.pop(name, None)

    def clear(self) -> None:
        """The broker was lost: its index starts empty."""
        self._names.clear()

"""The embeddings that prefill uses are those in the slots of the pool, and forged ones are refused."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.servers import Running
from cache.slot import HEADER_BYTES, MAGIC
from epd.builtin import DEMO_ANSWER, DEMO_QUESTION
from epd.config import CacheConfig, PrefillConfig
from tests.pipeline.chats import ask, chat, demo, tokens
from tests.pipeline.conftest import config
from tests.pipeline.test_disaggregation import of, story

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]

BODY = chat(DEMO_QUESTION, [demo()], cache_salt="slots")
NUM_PATCHES = 9


@contextlib.contextmanager
def pool_of(running: Running) -> Iterator[mmap.mmap]:
    """The memory of a pipeline's one pool, as its cache daemon has it open."""
    links = Path(f"/proc/{running.pid('cache')}/fd").iterdir()
    [path] = {os.readlink(link) for link in links if os.readlink(link).startswith("/dev/shm/epd-")}
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        yield memory


def slots_in(memory: mmap.mmap) -> list[int]:
    """Where the slots of a pool begin."""
    found, at = [], memory.find(MAGIC)
    while at >= 0:
        found.append(at)
        at = memory.find(MAGIC, at + HEADER_BYTES)
    return found


def forge(memory: mmap.mmap, where: str) -> int:
    """Changes the same thing in every slot; returns how many there are."""
    for at in (found := slots_in(memory)):
        offset, length = FORGERIES[where]
        data = slice(at + offset, at + offset + length)
        memory[data] = bytes(byte ^ 0x3F for byte in memory[data])
    return len(found)


# What a slot can be forged in: offset and length in the slot (see cache.slot), and the word that the story has for it.
FORGERIES = {
    "magic": (0, 8),
    "dtype": (12, 2),
    "generation": (16, 8),
    "shape": (24, 8),
    "owner": (40, 16),
    "checksum": (72, 16),
    "embeddings": (HEADER_BYTES, 256),
}
REASONS = {"magic": "header", "shape": " x ", "owner": "wrote this", "embeddings": "checksum"}


@pytest.fixture(scope="module")
def unchecked() -> Iterator[Running]:
    """A pipeline without checksums and without prefix caching, so that it reads the slots and believes them."""
    settings = config(warm_up=False)  # nothing is in the pool but what the test puts there
    settings.cache = CacheConfig(checksum=False)
    settings.prefill = PrefillConfig(engine={"enable_prefix_caching": False})
    running = Running(settings, encode=1, prefill=1, decode=1)
    yield running
    running.close()


@pytest.mark.parametrize("where", FORGERIES)
def test_forged_slots_are_refused_and_encoded_again(running: Running, where: str) -> None:
    body = chat(DEMO_QUESTION, [demo()], cache_salt=f"forged {where}")
    first = ask(running.http, body)
    with pool_of(running) as memory:
        assert forge(memory, where) >= NUM_PATCHES
    second = ask(running.http, body)
    assert tokens(second) == tokens(first)
    assert tokens(second)[0][1].strip() == DEMO_ANSWER
    events = story(running.http, second)
    assert len(of(events, "stale")) == len(of(events, "encoded")) == NUM_PATCHES
    assert REASONS.get(where, where) in of(events, "stale")[0]["detail"]
    running.wait_idle()


def test_without_checksums_overwritten_slots_change_the_answer(unchecked: Running) -> None:
    first = ask(unchecked.http, BODY)
    assert tokens(first) == tokens(ask(unchecked.http, BODY))
    with pool_of(unchecked) as memory:
        assert forge(memory, "embeddings") == NUM_PATCHES
    second = ask(unchecked.http, BODY)
    assert of(story(unchecked.http, second), "encode") == [], "the forged slots were used"
    assert tokens(second) != tokens(first)

"""What happens, told to whoever watches; and the names of it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from broker.core import journal
from broker.core.core import Core
from epd import messages as m
from epd.config import BrokerConfig
from epd.journal import ENDS, SPANS, Happening
from tests.broker.world import World, decode_info

ROOT = Path(__file__).resolve().parents[2]
EPOCH_S = 1_000_000.0


@pytest.fixture
def world() -> World:
    world = World()
    world.core = Core(BrokerConfig(), epoch_s=EPOCH_S)
    world.now = 5.0
    world.pipeline()
    world.say(world.endpoint, m.Watch())
    return world


def told(world: World) -> list[m.Journal]:
    world.wait(0.25)
    return world.take(m.Journal, world.endpoint)


def test_who_watches_is_told_of_requests_and_workers_once_a_tick_in_order(world: World) -> None:
    world.submit("r", ["a"])
    world.encode_all()
    world.join("late", m.Stage.DECODE, decode_info())
    [message] = told(world)
    assert message.num_dropped == 0
    assert [(one.event, one.request_id, one.worker) for one in message.entries] == [
        ("accepted", "r", ""),
        ("started", "r", ""),
        ("encode", "r", "e0"),
        ("encoded", "r", "e0"),
        ("joined", "", "late"),
    ]
    assert {one.at for one in message.entries} == {EPOCH_S + 5.0}
    assert told(world) == [], "nothing has happened since"


def test_stories_and_the_journal_say_the_same(world: World) -> None:
    world.submit("r", ["a", "b"])
    world.encode_all()
    world.finish("r", world.p[0], world.d[0])
    entries = [one for message in told(world) for one in message.entries]
    story = world.core.stories.story("r")
    assert story.began_at == EPOCH_S + 5.0
    assert [(one.event, one.worker, one.patch, one.detail) for one in story.events] == [
        (one.event, one.worker, one.patch, one.detail) for one in entries
    ]
    assert [story.began_at + one.at_s for one in story.events] == [one.at for one in entries]


def test_a_journal_is_bounded_and_says_how_much_is_missing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MAX_ENTRIES", 3)
    for number in range(4):
        world.submit(f"r{number}")
    [message] = told(world)
    assert [one.event for one in message.entries] == ["accepted", "started", "accepted"]
    assert message.num_dropped == 5


@pytest.mark.parametrize("how", ["no longer", "gone", "never"])
def test_nothing_is_kept_for_nobody(world: World, how: str) -> None:
    match how:
        case "no longer":
            world.say(world.endpoint, m.Watch(on=False))
        case "gone":
            world.say(world.endpoint, m.Goodbye())
            world.endpoint = world.join("ep", m.Kind.ENDPOINT)
        case "never":
            world.core = Core(BrokerConfig())
            world.names.clear()
            world.pipeline()
    world.submit("r", ["a"])
    assert told(world) == []
    assert world.core._journal._entries == []


def test_no_name_of_a_happening_is_written_where_the_names_are_not() -> None:
    """So that a name can be changed, and whoever reads one finds who writes it."""
    words = {str(one) for one in Happening} - {"failed", "finished", "cancelled", "serves", "left", "draining"}
    wrong = []
    for package in ("epd", "broker"):
        for path in (ROOT / package).rglob("*.py"):
            for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
                is_own = path.name == "journal.py" or "__slots__" in line or line.lstrip().startswith('"')
                if not is_own and re.search(rf'(== |get\(|\[|tell\(now, )"({"|".join(words)})"', line):
                    wrong.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not wrong, "\n".join(wrong)


def test_spans_begin_and_end_with_what_happens_to_requests() -> None:
    of_workers = {Happening.JOINED, Happening.SERVES, Happening.DRAINING, Happening.LEFT}
    assert not of_workers & {*SPANS, *SPANS.values(), *ENDS}

"""Nobody but `broker.core.request` writes the state of a request or of a leg, and no function of the broker is long."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from broker.core.request import TRANSITIONS, Event, InvalidTransitionError, Leg, Request, State
from epd import messages as m
from tests.broker.world import World

BROKER = Path(__file__).resolve().parents[2] / "broker"
OWN = "core/request.py"
MAX_LINES = 60  # of one function
FIELDS = {*Leg.__slots__, *Request.__slots__}
# Calls that change what a field holds.
CHANGES = {"add", "append", "clear", "discard", "extend", "insert", "pop", "remove", "setdefault", "update"}


def written(source: str) -> list[tuple[int, str]]:
    """Each attribute of another object than `self` that a source assigns or deletes, or whose content it changes."""
    found = []
    for node in ast.walk(ast.parse(source)):
        targets: list[ast.expr] = []
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AugAssign | ast.AnnAssign):
            targets = [node.target]
        elif isinstance(node, ast.Delete):
            targets = node.targets
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
            targets = [node.func.value]
        for target in (one for each in targets for one in parts_of(each)):
            place = target.value if isinstance(target, ast.Subscript) else target
            is_own = isinstance(place, ast.Attribute) and ast.unparse(place.value) == "self"
            if isinstance(place, ast.Attribute) and not is_own:
                found.append((place.lineno, f"{ast.unparse(place.value).rpartition('.')[2]}.{place.attr}"))
    return found


def parts_of(target: ast.expr) -> list[ast.expr]:
    """What a target assigns: each part of a tuple or list by itself."""
    if isinstance(target, ast.Tuple | ast.List):
        return [part for each in target.elts for part in parts_of(each)]
    return parts_of(target.value) if isinstance(target, ast.Starred) else [target]


def test_nobody_else_writes_the_state_of_a_request_or_a_leg() -> None:
    wrong = []
    for path in sorted(BROKER.rglob("*.py")):
        name = path.relative_to(BROKER).as_posix()
        if name == OWN or name.startswith("virtual/"):  # there, a leg is a worker's own
            continue
        for line, what in written(path.read_text("utf-8")):
            whose, _, field = what.partition(".")
            if whose in ("leg", "request", "holder") and field in FIELDS - {"timers"}:
                wrong.append(f"{name}:{line} writes {what}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("source", "what"),
    [
        ("request.state = 1", "request.state"),
        ("self._request.leg.pushed = True", "leg.pushed"),
        ("leg.missing.discard(x)", "leg.missing"),
        ("request.output_token_ids += ids", "request.output_token_ids"),
        ("del request.patches[x]", "request.patches"),
        ("x, (*leg.missing, y) = z", "leg.missing"),
    ],
)
def test_every_way_to_write_a_field_is_seen(source: str, what: str) -> None:
    assert what in [each for _, each in written(source)]


def test_an_illegal_change_raises_with_the_story() -> None:
    world = World()
    world.pipeline()
    world.submit("r", max_tokens=4)
    request = world.core.requests["r"]
    with pytest.raises(InvalidTransitionError, match=r"start in state prefilling: r: .*accepted"):
        request.start(request.leg.prefill, None, 0, [])
    world.say(world.endpoint, m.Cancel(request_id="r"))
    for change in (request.fail, request.cancel, request.kv_there, lambda: request.finish([1])):
        with pytest.raises(InvalidTransitionError, match="in state cancelled"):
            change()


def test_a_request_that_has_ended_keeps_no_frames() -> None:
    world = World()
    world.pipeline()
    world.submit("r", ["h"], max_tokens=4)
    request = world.core.requests["r"]
    assert request.frames_bytes > 0
    world.say(world.endpoint, m.Cancel(request_id="r"))
    assert (list(request.engine_frames), request.patch_frames, request.timers) == ([], {}, [])
    assert world.core.ledger.held_bytes == 0


def test_no_function_of_the_broker_is_long() -> None:
    long = []
    for path in sorted(BROKER.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                num_lines = (node.end_lineno or 0) - node.lineno + 1
                if num_lines >= MAX_LINES:
                    long.append(f"{path.relative_to(BROKER)}:{node.lineno} {node.name}: {num_lines} lines")
    assert not long, "\n".join(long)


def test_the_table_names_every_state_that_can_be_left_and_every_event() -> None:
    assert {event for _, event in TRANSITIONS} == set(Event)
    assert {state for state, _ in TRANSITIONS} | set(TRANSITIONS.values()) == set(State)

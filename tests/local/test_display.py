"""What people and pipes see of a pipeline: where there is no terminal, a line stays a line."""

import io
import json

import pytest
from rich.table import Table

from epd.local.daemon import Daemon, Spec, State
from epd.local.display import Display, PatientConsole

LONG = json.dumps({"event": "engine failed", "reason": "[red]" + "many words " * 9000, "level": "error"})


def piped(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    return PatientConsole(file=io.StringIO())


def daemon(tmp_path, *lines, **more):
    log = tmp_path / "decode-0.log"
    log.write_text("".join(f"{line}\n" for line in lines))
    return Daemon(spec=Spec(name="decode-0", role="decode"), log_path=log, **more)


def test_a_json_line_of_a_daemon_is_one_line_in_a_pipe(tmp_path, monkeypatch):
    console = piped(monkeypatch)
    display = Display(console, verbose=True)
    display.on_change(daemon(tmp_path, LONG, "short"))
    console.file.truncate(0), console.file.seek(0)
    display._show_new_lines({})
    first, second = console.file.getvalue().splitlines()
    assert json.loads(first.partition("│ ")[2]) == json.loads(LONG)
    assert second.endswith("│ short")


@pytest.mark.parametrize("state", list(State))
def test_each_change_is_one_line_in_a_pipe(tmp_path, monkeypatch, state):
    console = piped(monkeypatch)
    Display(console).on_change(daemon(tmp_path, state=state, status=1, detail="a reason " * 40))
    assert len(console.file.getvalue().splitlines()) == (state is not State.WAITING)


def test_a_failure_while_it_runs_is_one_line_with_its_reason(tmp_path, monkeypatch):
    console = piped(monkeypatch)
    display = Display(console)
    display._phase = "run"
    display.on_change(daemon(tmp_path, state=State.FAILED, status=1, detail="[x] " + "a reason " * 40))
    [line] = console.file.getvalue().splitlines()
    assert "[x] a reason" in line
    assert line.endswith("decode-0.log")


def test_cells_of_a_table_are_not_cut_in_a_pipe(monkeypatch):
    console = piped(monkeypatch)
    table = Table()
    for _ in range(4):
        table.add_column("name")
    table.add_row(*["a remark of many words " * 8] * 4)
    console.print(table)
    assert console.file.getvalue().count("a remark of many words " * 7) == 4


def test_a_terminal_keeps_its_width():
    assert PatientConsole(file=io.StringIO(), force_terminal=True, width=90).width == 90
    assert PatientConsole(file=io.StringIO(), force_terminal=True).width < 1000

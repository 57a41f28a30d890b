"""Whoever says it, it is one line on standard error: ours, of libraries, of Python's warnings, from any thread."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
BEGIN = """
import logging, os, threading, warnings
import structlog
from epd.config import LogConfig
from epd.process import logs
logs.configure(LogConfig(format={form!r}, level={level!r}), "decode-0")
"""


def said(code, form="json", level="info", env=()):
    command = [sys.executable, "-c", BEGIN.format(form=form, level=level) + code]
    environment = {"PATH": "/usr/bin", "COLUMNS": "80", **dict(env)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == ""
    return ended.stderr.splitlines()


def events(code, **options):
    return [json.loads(line) for line in said(code, **options)]


def test_our_events_and_those_of_libraries_have_one_form():
    code = """
structlog.get_logger().info("ours", number=1)
logging.getLogger("vllm.engine").warning("theirs: %d\\nand more", 2)
logging.getLogger("vllm.engine").error("bad")
"""
    ours, theirs, bad = events(code)
    assert (ours["event"], ours["number"], ours["level"], ours["daemon"]) == ("ours", 1, "info", "decode-0")
    assert (theirs["event"], theirs["level"], theirs["source"]) == ("theirs: 2 and more", "warning", "vllm.engine")
    assert theirs["daemon"] == "decode-0" and theirs["timestamp"]
    assert bad["level"] == "error"


def test_a_warning_is_told_once_and_errors_each_time():
    code = """
for _ in range(3):
    logging.getLogger("vllm.v1.worker.cpu_worker").warning("threads are bound")
    logging.getLogger("vllm.other").warning("threads are bound")
    logging.getLogger("vllm.v1.worker.cpu_worker").warning("request %s is odd", _)
    logging.getLogger("vllm.v1.worker.cpu_worker").error("lost")
"""
    told = [event["event"] for event in events(code)]
    assert told.count("threads are bound") == 2, "once for each who says it"
    assert [told.count(f"request {i} is odd") for i in range(3)] == [1, 1, 1]
    assert told.count("lost") == 3


def test_what_is_remembered_of_warnings_is_bounded():
    code = """
for number in range(5000):
    logging.getLogger("x").warning("number %d", number)
print(len(logging.getLogger().handlers[0]._seen), file=__import__("sys").stderr)
"""
    assert int(said(code)[-1]) == 1024


def test_every_thread_says_which_daemon_it_is_of():
    code = """
def say(): structlog.get_logger().info("here"); logging.getLogger("a").error("there")
thread = threading.Thread(target=say); thread.start(); thread.join()
"""
    assert [event["daemon"] for event in events(code)] == ["decode-0"] * 2


def test_pythons_warnings_are_lines_and_those_about_the_future_are_none():
    code = """
warnings.warn("look out", RuntimeWarning)
warnings.warn("soon", FutureWarning)
warnings.warn("old", DeprecationWarning)
"""
    [event] = events(code)
    assert event["event"].startswith("RuntimeWarning: look out (")
    assert event["level"] == "warning"


def test_an_exception_is_within_its_json_line():
    code = """
try:
    raise ValueError("a\\nb")
except ValueError:
    logging.getLogger("a").exception("failed"); structlog.get_logger().exception("ours")
"""
    assert all("ValueError: a\nb" in event["exception"] for event in events(code))


@pytest.mark.parametrize("form", ["json", "console"])
def test_no_line_is_wrapped(form):
    code = 'structlog.get_logger().info("x" * 500, reason="y " * 500); logging.getLogger("a").error("z " * 500)'
    first, second = said(code, form=form)
    assert len(first) > 1500 and len(second) > 1000


def test_libraries_are_heard_from_warnings_on_or_as_they_are_told_to():
    code = """
logging.getLogger("vllm.a").info("quiet"); logging.getLogger("httpx").info("quiet")
logs.hear("vllm.b"); logging.getLogger("vllm.b").info("heard")
"""
    assert [event["event"] for event in events(code)] == ["heard"]
    assert len(events(code, env={"VLLM_LOGGING_LEVEL": "INFO"})) == 2
    assert len(events(code, env={"VLLM_LOGGING_LEVEL": "DEBUG"}, level="debug")) == 3


def test_a_library_that_brings_its_own_handler_is_made_to_speak_as_all():
    code = """
theirs = logging.getLogger("nixl"); theirs.addHandler(logging.StreamHandler()); theirs.propagate = False
theirs.setLevel(logging.INFO)
logs.adopt("nixl")
logging.getLogger("nixl.api").info("quiet"); logging.getLogger("nixl.api").warning("heard")
"""
    [event] = events(code)
    assert (event["event"], event["source"]) == ("heard", "nixl.api")

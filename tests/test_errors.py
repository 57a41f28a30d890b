"""One vocabulary of errors: every code has its status, its fault and its exception, and nobody makes up another."""

import ast
import json
from pathlib import Path

import pytest

from epd.client import APIError, AuthenticationError, BadRequest, NotFound, Overloaded, ServerError
from epd.client.errors import api_error, error_from_answer
from epd.errors import ErrorCode, Fault

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("epd", "broker", "cache", "workers")
# Who may make a Failure of what others have said: of vLLM's errors in streams, and of the broker's messages.
RELAYS = ("epd/endpoint/http/failures.py", "epd/endpoint/engine/flights.py")
# What carries a code, and by which argument.
CARRIERS = {"Failure": "code", "Failed": "code", "Uploaded": "code", "RefusedError": 0, "failure_of": 0}

EXCEPTIONS = {
    400: BadRequest,
    401: AuthenticationError,
    404: NotFound,
    413: BadRequest,
    429: Overloaded,
    503: Overloaded,
}


def calls():
    """The file and each call of the four packages, with the name of what is called."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Call):
                    yield path.relative_to(ROOT).as_posix(), node, ast.unparse(node.func).rpartition(".")[2]


def test_no_code_is_a_word_outside_the_enum():
    wrong = []
    for path, node, name in calls():
        place = CARRIERS.get(name)
        given = node.args[:1] if place == 0 else [each.value for each in node.keywords if each.arg == place]
        if given and isinstance(given[0], ast.Constant | ast.JoinedStr) and ast.unparse(given[0]) != "''":
            wrong.append(f"{path}:{node.lineno} {ast.unparse(given[0])}")
    assert not wrong, "\n".join(wrong)


def test_failures_are_made_of_codes_unless_somebody_else_has_said_them():
    made = {path for path, _, name in calls() if name == "Failure"}
    assert made == set(RELAYS)


@pytest.mark.parametrize("code", ErrorCode)
def test_status_fault_and_retry_of_a_code_agree(code):
    assert ErrorCode(str(code)) is code
    assert (code.fault is Fault.CLIENT) == (400 <= code.status < 500)
    assert code.retry == (code.status in (429, 502, 503)), "these are what `Retry-After` goes with"
    assert code.meaning and not code.meaning.endswith(".")


def test_families_of_codes_are_complete():
    for kind in ("image", "video", "audio"):
        for pattern in ("invalid_{}", "{}_too_large", "too_many_{}s"):
            assert ErrorCode(pattern.format(kind)).fault is Fault.CLIENT


@pytest.mark.parametrize("code", ErrorCode)
def test_the_client_knows_a_code_in_an_answer_and_in_a_stream(code):
    body = {"error": {"message": "because", "type": str(code), "param": None, "code": code.status}}
    for error in (
        error_from_answer(code.status, {}, json.dumps(body).encode()),
        api_error(None, body),
        api_error(None, {"type": "error", "code": str(code), "message": "because", "param": None}),
    ):
        assert (error.reason, error.status, error.may_retry) == (code, code.status, code.retry)
        assert type(error) is EXCEPTIONS.get(code.status, ServerError if code.status >= 500 else APIError)


def test_words_of_others_are_told_as_they_are():
    theirs = api_error(404, {"error": {"message": "no", "type": "NotFoundError", "code": 404}})
    assert (theirs.reason, theirs.may_retry) == ("NotFoundError", False)
    assert (api_error(502, "Bad Gateway").reason, api_error(502, "Bad Gateway").may_retry) == (None, True)
    assert api_error(500, {"error": "just text"}).reason is None
    assert api_error(500, []).reason is None

"""The page `docs/errors.md`, from `epd.errors` and `epd.client.errors`; only the text between the facts is here.

Lives in a developer's process; pure.
"""

from __future__ import annotations

from epd.client.errors import class_of
from epd.docs.parts import note
from epd.errors import ErrorCode, Fault

_TEXT = """\
# Errors

Every request ends with its answer or with one error. The error's JSON has vLLM's shape, on `/v1/messages` Anthropic's.
`error.type` is a stable word for what is wrong, and `error.code` is the HTTP status:

```json
{"error": {"message": "no worker became free in time", "type": "overloaded", "param": null, "code": 503}}
```

A stream that has begun ends with that object as its last event; on `/v1/responses` the event's `code` is the word.
Refusals by vLLM's own handlers have vLLM's words (`BadRequestError`, `NotFoundError` and others) and statuses.

If the same request is likely to be answered a little later ("retry"), the answer has `Retry-After`, in seconds. The
last column is what `epd.Client` raises; there `error.reason` is the word, and `error.may_retry` is the same as "retry".
"""

_HEADINGS = {
    Fault.CLIENT: "## The request, or what its client does\nIt has to change, or to wait if retry says so.",
    Fault.CAPACITY: "## Room and time\nNothing is wrong; there is too much to do, or it takes too long.",
    Fault.SERVER: "## The pipeline\nSomething is away or has failed; its operator finds the reason in the logs.",
}


def errors() -> str:
    """The page `docs/errors.md`."""
    lines = [note("epd/errors.py and epd/client/errors.py"), _TEXT]
    for fault, heading in _HEADINGS.items():
        lines += [heading, "", "| type | status | retry | when | exception |", "|---|---|---|---|---|"]
        lines += [
            f"| `{code}` | {code.status} | {'yes' if code.retry else ''} | {code.meaning} "
            f"| `{class_of(code.status).__name__}` |"
            for code in ErrorCode
            if code.fault is fault
        ]
        lines.append("")
    return "\n".join(lines)

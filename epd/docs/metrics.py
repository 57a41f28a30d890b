"""The page `docs/metrics.md`, from `epd.endpoint.ops`; only the text between the facts stands here.

Lives in a developer's process; pure.
"""

from __future__ import annotations

from collections.abc import Mapping

from epd.docs.parts import note
from epd.endpoint.ops.metrics import COUNTS, GAUGES, OWN
from epd.endpoint.ops.vllm_families import DROPPED, OF_WORKERS, REAL

_TEXT = """\
# Metrics

`GET /metrics` of an endpoint is for Prometheus. It has vLLM's families whose values are real in a pipeline, the
pipeline's own (`epd_*`), and those of HTTP (`http_requests_total` and `http_request_duration_*`, by route and status).
What workers and the broker tell is as of their last heartbeats, a second ago (`broker.heartbeat_s`), and the same at
every endpoint; what an endpoint sees of its own requests is exact, and adds up over endpoints.
"""
_REAL = """\
## vLLM's, of the endpoint's requests
As of one plain vLLM; `engine` is "0".
"""
_WORKERS = """\
## vLLM's, of each worker
`engine` is the worker's name, and `stage` says what it does. Counters start over when a worker does.
"""
_DROPPED = """\
## vLLM's that are not there
An endpoint has no engine of its own, so these would say nothing. Nor are families there that are not listed here.
"""
_OWN = """\
## The pipeline's own
Beside them, `epd_held` has for each daemon what `GET /debug/held` shows.
"""


def metrics() -> str:
    """The page `docs/metrics.md`."""
    told = {name: each.help for name, each in OF_WORKERS.items()}
    own = OWN | {f"{name}_total": text for name, text in COUNTS.values()} | dict(GAUGES.values())
    parts = [
        note("epd/endpoint/ops/vllm_families.py and metrics.py"),
        _TEXT,
        _REAL + _table("from", REAL),
        _WORKERS + _table("what", told),
        _DROPPED + _table("why", DROPPED),
        _OWN + _table("what", own),
    ]
    return "\n".join(parts)


def _table(column: str, rows: Mapping[str, str]) -> str:
    lines = [f"| family | {column} |", "|---|---|", *(f"| `{name}` | {text} |" for name, text in rows.items())]
    return "\n" + "\n".join(lines) + "\n"

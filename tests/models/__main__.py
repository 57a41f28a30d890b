"""`python -m tests.models report` writes docs/models.md."""

from __future__ import annotations

import os
import sys

from epd.local import environment

if __name__ == "__main__":
    if sys.argv[1:] != ["report"]:
        sys.exit("usage: python -m tests.models report")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    environment.set_engine_environment("/")
    from tests.models.report import write

    write()

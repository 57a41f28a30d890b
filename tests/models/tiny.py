"""Makes one of the tiny random models: `python -m tests.models.tiny NAME FOLDER`."""

from __future__ import annotations

import sys
from pathlib import Path

from tests.models.registry import FAMILIES

if __name__ == "__main__":
    name, folder = sys.argv[1], Path(sys.argv[2])
    print(FAMILIES[name].folder(folder.parent, folder.name))

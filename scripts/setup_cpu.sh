#!/usr/bin/env bash
# Makes .venv in the repository: Python, the vLLM CPU engine, EPD itself (editable) and the tools for its tests.
#
#   scripts/setup_cpu.sh
#
# Safe to run at any time: a second run does nothing unless a requirement, this script or pyproject.toml changed.
# pip's own configuration decides where packages come from. Two variables may be set:
#   PYTHON           the interpreter for .venv (default: the first of python3.11, python3.12, python3 that will do)
#   EPD_TORCH_INDEX  a package index that has CPU builds of torch and torchvision, if pip's default has not
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv
STAMP=$VENV/.epd-stamp
INPUTS=(requirements/cpu.txt requirements/dev.txt pyproject.toml scripts/setup_cpu.sh
    scripts/mend_site_packages.py scripts/torchvision_cpu_ops.py)

# The folder is part of the stamp: an environment that was moved or copied has stale paths in it.
fingerprint() { { pwd -P; echo "${EPD_TORCH_INDEX:-}"; cat "${INPUTS[@]}"; } | sha256sum | cut -d' ' -f1; }
up_to_date() { [[ -x $VENV/bin/python && -f $STAMP && $(<"$STAMP") == "$wanted" ]]; }
say() { echo "setup: $*"; }
# -qq leaves errors only; without it pip warns about each configured location that happens to be empty.
install() { "$VENV/bin/python" -m pip install -qq --disable-pip-version-check "$@"; }
pin() { grep -E "^$1==" requirements/cpu.txt; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: no Python 3.11 or 3.12 found${PYTHON:+ at $PYTHON}; set PYTHON to one" >&2
    return 1
}

wanted=$(fingerprint)
if up_to_date; then exit 0; fi

# One at a time: whoever waited here finds the work done.
exec 9<requirements/cpu.txt
flock 9
if up_to_date; then exit 0; fi
rm -f "$STAMP"

if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    say "making $VENV with $("$python" --version)"
    "$python" -m venv --clear "$VENV"
fi

# Torch with dependencies, unlike the rest: the build that pip finds may need more than the pinned set has. First, so
# that pip has nothing to complain about.
say "installing $(pin torch) and $(pin torchvision)"
from=()
if [[ -n ${EPD_TORCH_INDEX:-} ]]; then from=(--index-url "$EPD_TORCH_INDEX"); fi
install "${from[@]}" "$(pin torch)"
install "${from[@]}" --no-deps "$(pin torchvision)"

say "installing the vLLM CPU engine and the test tools (minutes, the first time)"
install --no-deps -r <(grep -vE '^torch(vision)?==' requirements/cpu.txt) -r requirements/dev.txt
"$VENV/bin/python" scripts/mend_site_packages.py

say "installing epd"
install --no-deps --no-build-isolation -e .
echo "$wanted" >"$STAMP"
say "done"

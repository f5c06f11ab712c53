#!/bin/sh
# Prints the path of a Python that can make the project's virtual environment: 3.12 or later, with venv and ensurepip.
# Order: $PYTHON alone when set; python3.12, python3.13, python3 on PATH; pyenv's versions; uv's.
# A candidate counts only after it ran: a pyenv shim is on PATH even when its version is not selected.
# Exit 2 with one line on stderr when there is none.
#
# Example: PYTHON=/opt/python3.12/bin/python3 sh tools/find_python.sh

usable() {
    "$1" -c 'import ensurepip, sys, venv; sys.version_info < (3, 12) and sys.exit(1); print(sys.executable)' 2>/dev/null
}

if [ -n "${PYTHON:-}" ]; then
    usable "$PYTHON" && exit 0
    echo "find_python: PYTHON=$PYTHON is not a Python 3.12 or later with venv and ensurepip" >&2
    exit 2
fi

for name in python3.12 python3.13 python3; do
    if command -v "$name" >/dev/null 2>&1; then
        usable "$name" && exit 0
    fi
done

pyenv_root="${PYENV_ROOT:-${HOME:-}/.pyenv}"
for python in "$pyenv_root"/versions/3.12*/bin/python3 "$pyenv_root"/versions/3.1[3-9]*/bin/python3; do
    if [ -x "$python" ]; then
        usable "$python" && exit 0
    fi
done

if command -v uv >/dev/null 2>&1; then
    python="$(uv python find '>=3.12' 2>/dev/null)" && usable "$python" && exit 0
fi

echo "find_python: no Python 3.12 or later with venv on PATH, in pyenv or in uv: install one or set PYTHON=/path/to/python3.12" >&2
exit 2

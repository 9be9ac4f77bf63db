#!/usr/bin/env bash
# Make an environment in .venv-test, install what the tests need, and run them.
set -euo pipefail
cd "$(dirname "$0")"
[ -x .venv-test/bin/python ] || python3 -m venv .venv-test
.venv-test/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
.venv-test/bin/ruff check --line-length 130 --select E,F,W,PLE .
.venv-test/bin/python -m pytest -q --durations=10 "$@"

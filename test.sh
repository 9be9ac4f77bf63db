#!/usr/bin/env bash
# Make an environment in .venv-test, install what the tests need, check the layout, and run the tests:
# all, in two processes, or those named.
set -euo pipefail
cd "$(dirname "$0")"
[ -x .venv-test/bin/pip ] || python3 -m venv .venv-test
.venv-test/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and
    ".venv-test has Python %d.%d: delete it, and make it with 3.11 or newer" % sys.version_info[:2])'
# not all of it compiled, but what is imported, when it first is: half a minute less
unset PYTHONDONTWRITEBYTECODE
.venv-test/bin/pip install --quiet --no-compile --disable-pip-version-check -r requirements-dev.txt
.venv-test/bin/ruff format --check .
.venv-test/bin/ruff check .

# one thread each: two processes of two threads on two cores wait for each other
export OMP_NUM_THREADS=1
processes=2
if (($#)); then processes=0; fi
.venv-test/bin/python -m pytest -q --durations=5 -n $processes --dist worksteal "$@"

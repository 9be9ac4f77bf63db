#!/usr/bin/env bash
# Make an environment in .venv-test, install what the tests need, and run them: all, in two halves side by side, or those named.
set -euo pipefail
cd "$(dirname "$0")"
[ -x .venv-test/bin/python ] || python3 -m venv .venv-test
.venv-test/bin/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
.venv-test/bin/ruff check --select F .
tests() { OMP_NUM_THREADS=1 .venv-test/bin/python -m pytest -q --durations=5 "$@"; }

if (($#)); then
    tests "$@"
    exit
fi
tests tests/test_[a-r]*.py > .venv-test/first-half.log 2>&1 & first=$!
tests tests/test_[s-z]*.py && second=0 || second=$?
wait $first && first=0 || first=$?
cat .venv-test/first-half.log
exit $((first | second))

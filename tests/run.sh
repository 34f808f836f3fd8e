#!/usr/bin/env bash
# Makes or completes .venv, then runs ruff, mypy and pytest. Arguments go to pytest. mypy runs at the
# same time as pytest. Four workers use two cores well, because ranks mostly wait for each other.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=../example_scripts/venv.sh
source example_scripts/venv.sh -r requirements-dev.txt

ruff check .
ruff format --check --quiet . || { ruff format --diff --quiet .; exit 1; }

types=$(mktemp)
trap 'rm -f "$types"' EXIT
mypy . >"$types" 2>&1 &
mypy=$!
status=0
pytest --numprocesses 4 --dist loadfile "$@" || status=$?
wait $mypy || { cat "$types"; status=1; }
tail -n 1 "$types"
exit $status

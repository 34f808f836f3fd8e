#!/usr/bin/env bash
# Makes or completes .venv, then runs ruff, mypy --strict and pytest (its arguments are pytest's).
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=../example_scripts/venv.sh
source example_scripts/venv.sh ruff mypy pytest hypothesis bitsandbytes
ruff check .
mypy --strict .
exec pytest "$@"

#!/usr/bin/env bash
# Makes or completes .venv, then runs ruff, mypy --strict and pytest (its arguments are pytest's).
set -euo pipefail
cd "$(dirname "$0")/.."
# CuPy and NCCL need no GPU to be imported. They are those of CUDA 13, as PyPI's torch is: NCCL for
# CUDA 12 would overwrite the library that this torch brings.
# shellcheck source=../example_scripts/venv.sh
source example_scripts/venv.sh ruff mypy pytest hypothesis bitsandbytes \
  cupy-cuda13x nvidia-nccl-cu13
ruff check .
mypy --strict .
exec pytest "$@"

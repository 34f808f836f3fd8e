#!/usr/bin/env bash
# Runs example_scripts/quickstart.py in .venv: the complete way of a model on a machine without a GPU,
# in less than 90 s after the installation.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=example_scripts/venv.sh
source example_scripts/venv.sh
# Ignores variables that a cluster's shell can have set.
unset GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT
export WANDB_MODE=disabled HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
exec python -m example_scripts.quickstart

#!/usr/bin/env bash
# Runs the checks for a machine with a GPU, in at most 8 minutes; it needs no network and no pytest.
#   bash tests/gpu/run.sh [--python PYTHON] [--wheels FOLDER] [--device cuda|cpu] [--only 0,1,2]
#                         [--quick] [--out FOLDER]
# Python is --python, else $PYTHON, else the first of `python3`, `python` and .venv/bin/python that
# has torch. Packages that it lacks come from the wheels in --wheels, and go to a temporary folder.
# See docs/developer/gpu-checks.md.
set -euo pipefail
limit=480
here=$PWD
cd "$(dirname "$0")/../.."

absolute() { case "$1" in /*) echo "$1" ;; *) echo "$here/$1" ;; esac; }

python=${PYTHON:-}
device=cuda
wheels=()
arguments=()
while (($#)); do
  case "$1" in
    --python | --wheels | --device | --out)
      if (($# < 2)); then echo "$1 needs a value" >&2; exit 2; fi
      ;;&
    --python)
      case "$2" in */*) python=$(absolute "$2") ;; *) python=$2 ;; esac
      shift
      ;;
    --wheels) wheels=(--wheels "$(absolute "$2")"); shift ;;
    --device) device=$2; arguments+=(--device "$2"); shift ;;
    --out) arguments+=(--out "$(absolute "$2")"); shift ;;
    *) arguments+=("$1") ;;
  esac
  shift
done

has_torch() { "$1" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' 2>/dev/null; }

if [ -z "$python" ]; then
  for candidate in python3 python .venv/bin/python; do
    if has_torch "$candidate"; then python=$candidate; break; fi
  done
fi
if [ -z "$python" ]; then
  echo "no Python with torch: tried python3, python and .venv/bin/python; name one with --python" >&2
  exit 2
fi

packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
"$python" -m tests.gpu.packages --device "$device" --target "$packages" ${wheels[@]+"${wheels[@]}"}
export PYTHONPATH="$packages${PYTHONPATH:+:$PYTHONPATH}"
if [ "$device" = cuda ]; then arguments+=(--total $((limit - SECONDS))); fi
status=0
"$python" -m tests.gpu.driver ${arguments[@]+"${arguments[@]}"} || status=$?
exit $status

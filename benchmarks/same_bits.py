"""Comparison of two checkouts: checks whether both train to the same bits.

    python benchmarks/same_bits.py record --checkout DIR --out FILE.json
    python benchmarks/same_bits.py compare A.json B.json

Run it before and after a refactoring. `record` trains every run of the table in same_bits_runs.py
with the dist_clm_train.py of a checkout, one process per rank; with two cores this takes about
three minutes. It writes the exact metrics of every iteration, and a SHA-256 of every tensor in the
last checkpoint and in the layer shards. It uses only the command line and the files on disk, and
imports nothing from the checkout, so source files may have moved in the second checkout. `compare`
prints a line for each run: identical, or the first difference. Its exit status is 1 if anything
differs. Bits depend on the processor and on the versions of libraries, so both files must be made
on one machine with one Python environment.
"""

import argparse
import hashlib
import json
import platform
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import load_file

from benchmarks.same_bits_ranks import FailedError, prepare, run_processes
from benchmarks.same_bits_runs import (
    COMMON,
    GLOBAL_BATCH,
    LAYERS,
    MODELS,
    RUNS,
    Run,
    make_inputs,
)

Entry = dict[str, dict[str, str]]  # place (a step, or a set of tensors) -> key -> exact value
# metrics that differ between any two runs, and a number that older checkouts lack
IGNORED_METRICS = {"step_seconds", "tokens_per_second", "tflops", "mfu", "tokens_processed"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("record", help="train all runs, store their bits").add_argument
    add("--checkout", type=Path, required=True, help="folder with dist_clm_train.py")
    add("--out", type=Path, required=True, help="the file to write")
    add("--only", help="names of runs, separated by commas; default: all")
    add("--deadline", type=float, default=300.0, help="limit in seconds for each start of a run")
    add("--fresh", action="store_true", help="start a new interpreter for each process (slower)")
    add = commands.add_parser("compare", help="compare two files of record").add_argument
    add("files", type=Path, nargs=2)
    args = parser.parse_args()
    if args.command == "compare":
        before, after = (json.loads(path.read_text()) for path in args.files)
        sys.exit(1 if compare(before, after) else 0)
    try:
        record(args.checkout.resolve(), args.out, _chosen(args.only), args.deadline, args.fresh)
    except FailedError as error:
        sys.exit(f"same_bits: {error}")


def _chosen(only: str | None) -> list[Run]:
    names = [run.name for run in RUNS] if only is None else only.split(",")
    if unknown := set(names) - {run.name for run in RUNS}:
        raise FailedError(f"--only: there is no run {', '.join(sorted(unknown))}")
    return [run for run in RUNS if run.name in names]


def record(checkout: Path, out: Path, runs: Sequence[Run], deadline: float, fresh: bool) -> None:
    """Trains the runs, and writes their bits to `out`."""
    if not (checkout / "dist_clm_train.py").is_file():
        raise FailedError(f"--checkout {checkout} has no dist_clm_train.py")
    prepare()
    began = time.monotonic()
    entries: dict[str, Entry] = {}
    with tempfile.TemporaryDirectory(prefix="same-bits-") as name:
        folder = Path(name)
        make_inputs(folder)
        for model in dict.fromkeys(run.model for run in runs):
            run_here = partial(run_processes, folder=folder, deadline=deadline, fresh=fresh)
            entries[f"shards of {model}"] = convert(checkout, folder, model, run_here)
        for run in runs:
            start = time.monotonic()
            is_fresh = fresh or run.is_fresh
            run_here = partial(run_processes, folder=folder, deadline=deadline, fresh=is_fresh)
            entries[run.name] = train(checkout, folder, run, run_here)
            print(f"{run.name}: {time.monotonic() - start:.1f} s", flush=True)
    made_with = {
        "processor": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")},
    }
    out.write_text(json.dumps({"made with": made_with, "entries": entries}, indent=1) + "\n")
    print(f"{len(runs)} runs in {time.monotonic() - began:.0f} s")


def convert(checkout: Path, folder: Path, model: str, run_here: Callable[..., None]) -> Entry:
    """Converts a model to layer shards; returns the bits of the shards."""
    script = checkout / f"convert_from_hf_{MODELS[model].family}.py"
    command = [str(script), "--model-name", f"hf/{model}", "--save-dir", "shards"]
    run_here([command], name=f"convert-{model}")
    return {"shards": tensor_bits(folder / "shards" / model, "*.pt")}


def train(checkout: Path, folder: Path, run: Run, run_here: Callable[..., None]) -> Entry:
    """Trains one run, which can start the script more than once; returns the bits of the run."""
    path = folder / "runs" / run.name
    metrics = path / "metrics.jsonl"
    for number, start in enumerate(run.starts):
        commands = rank_commands(checkout / "dist_clm_train.py", run, start)
        killed = number == 0 and run.killed_at > 0
        is_enough = partial(_has_lines, metrics, run.killed_at) if killed else None
        run_here(commands, name=f"{run.name}-{number}", is_enough=is_enough)
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    skipped = [line["grad_norm"] is None for line in lines]
    if run.overflows and (all(skipped) or not any(skipped)):
        raise FailedError(
            f"{run.name} skipped {sum(skipped)} of {len(skipped)} updates, expected some, not all"
        )
    latest = (path / "latest").read_text().strip()
    converted: Entry = {}
    if run.is_converted:
        script = checkout / f"convert_to_hf_{MODELS[run.model].family}.py"
        command = [str(script), "--ckpt-path", str(path), "--save-path", f"converted/{run.name}"]
        run_here([command], name=f"{run.name}-converted")
        converted["converted"] = tensor_bits(folder / "converted" / run.name, "*.safetensors")
    return {
        **{f"step {line['step']}": dict(metric_bits(line)) for line in lines},
        f"weights of step {latest}": tensor_bits(path / latest, "prank_*_checkpoint.pt"),
        f"optimizer of step {latest}": tensor_bits(path / latest, "prank_*_optimizer.pt"),
        **converted,
    }


def rank_commands(script: Path, run: Run, start: str) -> list[list[str]]:
    """Returns the command of each rank, without the interpreter."""
    shape, *flags = start.split()
    stages, replicas = map(int, shape.split("x"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"tcp://127.0.0.1:{server.getsockname()[1]}"
    model = MODELS[run.model]
    common = {
        "model-name": f"shards/{run.model}", "model-type": model.family,
        "num-layers": LAYERS // stages, "embedding-dim": model.hidden,
        "batch-size": GLOBAL_BATCH // replicas, "checkpoint-path": f"runs/{run.name}",
        "pipeline-group-size": stages, "data-group-size": replicas,
        "world-size": stages * replicas, "dist-url": url,
    }  # fmt: skip
    given = list(chain.from_iterable((f"--{flag}", str(value)) for flag, value in common.items()))
    given += COMMON.split() + flags
    return [[str(script), *given, "--rank", str(rank)] for rank in range(stages * replicas)]


def _has_lines(path: Path, count: int) -> bool:
    return path.exists() and path.read_bytes().count(b"\n") >= count


def metric_bits(line: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields each metric's name (if nested: `<key>.<metric>`) and exact value; leaves out times."""
    for key, value in line.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", bits) for inner, bits in metric_bits(value))
        elif key not in IGNORED_METRICS:
            yield key, value.hex() if isinstance(value, float) else json.dumps(value)


def tensor_bits(folder: Path, pattern: str) -> dict[str, str]:
    """Returns `<file> <key>` -> SHA-256 of the tensor, or `repr` of a value that is no tensor."""
    paths = sorted(folder.glob(pattern))
    if not paths:
        raise FailedError(f"{folder} has no file {pattern}")
    return {f"{path.name} {key}": bits for path in paths for key, bits in _value_bits(_load(path))}


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def _value_bits(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name in sorted(value, key=str):
            yield from _value_bits(value[name], f"{key}.{name}" if key else str(name))
    elif isinstance(value, torch.Tensor):
        content = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        about = f"{value.dtype} {tuple(value.shape)} ".encode()
        yield key, hashlib.sha256(about + content).hexdigest()
    else:
        yield key, repr(value)


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Prints a line for each run; returns whether anything differs."""
    if before["made with"] != after["made with"]:
        print(f"made with {before['made with']} and {after['made with']}: so bits may differ")
    differs = False
    for name in _names(before["entries"], after["entries"]):
        one, other = (side["entries"].get(name, {}) for side in (before, after))
        difference = _first_difference(one, other)
        differs |= difference is not None
        print(f"{name}: {difference or f'identical ({sum(map(len, one.values()))} values)'}")
    return differs


def _first_difference(one: Entry, other: Entry) -> str | None:
    for place in _names(one, other):
        mine, theirs = one.get(place, {}), other.get(place, {})
        for key in _names(mine, theirs):
            a, b = mine.get(key, "absent"), theirs.get(key, "absent")
            if a != b:
                return f"DIFFERS first at {place}, {key}: {a} and {b}"
    return None


def _names(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Returns the keys of `one`, and then the keys that only `other` has."""
    return list(dict.fromkeys([*one, *other]))


if __name__ == "__main__":
    main()

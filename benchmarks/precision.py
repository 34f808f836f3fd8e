"""Benchmark of precision: losses after 200 updates in each precision, with each optimizer.

    python benchmarks/precision.py [--updates 200]

Each run is one process; all runs train the same model on the same blocks. The benchmark prints the
training loss (mean of the last ten updates), the held-out loss after the last update, and each loss
divided by the same loss of the run in fp32 with adam. The exit status is 1 if such a ratio differs
from 1 by more than the limit of its run in `RUNS`, or is not a number.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from modules.matmul.cpu_info import CpuInfo


class PrecisionRun(NamedTuple):
    """The flags of a run; `limit` is the largest allowed difference of its loss ratios from 1."""

    flags: list[str]
    limit: float


RUNS = {
    "fp32": PrecisionRun([], 0.0),
    "bf16": PrecisionRun(["--bf16"], 0.01),
    "fp16": PrecisionRun(["--fp16"], 0.01),
    "fp32 8bit-adam": PrecisionRun(["--optimizer", "8bit-adam"], 0.02),
}


def train(folder: Path, name: str, flags: list[str], updates: int) -> tuple[float, float, float]:
    """Trains a run; returns mean loss (last ten updates), held-out loss and seconds per update."""
    checkpoints = folder / name.replace(" ", "-")
    command = [
        sys.executable,
        str(ROOT / "dist_clm_train.py"),
        "--model-type",
        "gptneox",
        "--model-name",
        str(folder / "shards" / "small-neox"),
        "--num-layers",
        "4",
        "--embedding-dim",
        "192",
        "--task-name",
        str(folder / "train.jsonl"),
        "--evaluation-data",
        str(folder / "held_out.jsonl"),
        "--seq-length",
        "128",
        "--batch-size",
        "8",
        "--micro-batch-size",
        "8",
        "--recompute",
        "false",
        "--total-steps",
        str(updates),
        "--warmup-steps",
        "10",
        "--lr",
        "3e-3",
        "--use-cuda",
        "false",
        "--checkpoint-path",
        str(checkpoints),
        *flags,
    ]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment())
    lines = [json.loads(line) for line in (checkpoints / "metrics.jsonl").read_text().splitlines()]
    last = [number(line["loss"]) for line in lines[-10:]]
    seconds = sorted(line["step_seconds"] for line in lines)[len(lines) // 2]
    return sum(last) / len(last), number(lines[-1]["eval_loss"]), seconds


def number(loss: float | None) -> float:
    """Returns `loss`, or NaN if None: metrics.jsonl has null for a loss that is not finite."""
    return math.nan if loss is None else loss


def environment() -> dict[str, str]:
    return {**os.environ, "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}


def prepare(folder: Path) -> None:
    """Makes the quick start's model, corpus and layer shards in `folder`."""
    for command in (
        ["example_scripts/quickstart_model.py", str(folder)],
        [
            "convert_from_hf_gptneox.py",
            "--model-name",
            str(folder / "hf" / "small-neox"),
            "--save-dir",
            str(folder / "shards"),
        ],
    ):
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def is_within(ratio: float, limit: float) -> bool:
    """Returns whether a ratio differs from 1 by at most `limit`; False for NaN."""
    return abs(ratio - 1.0) <= limit


def compare(folder: Path, updates: int) -> list[str]:
    """Prints a line for each run; returns the names of the runs that exceed their limit."""
    base: tuple[float, float] | None = None
    beyond = []
    print(f"{'':16s}{'loss':>9s}{'ratio':>9s}{'held-out':>10s}{'ratio':>9s}{'s/update':>10s}")
    for name, run in RUNS.items():
        loss, held_out, seconds = train(folder, name, run.flags, updates)
        base = base or (loss, held_out)
        ratios = (loss / base[0], held_out / base[1])
        print(
            f"{name:16s}{loss:9.4f}{ratios[0]:9.4f}{held_out:10.4f}{ratios[1]:9.4f}{seconds:10.3f}",
            flush=True,
        )
        if not all(is_within(ratio, run.limit) for ratio in ratios):
            beyond.append(f"{name} (limit {run.limit:.0%})")
    return beyond


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=200)
    args = parser.parse_args()
    print(f"{args.updates} updates on {CpuInfo.of_this_machine().name}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        beyond = compare(folder, args.updates)
    if beyond:
        sys.exit(f"too far from fp32 with adam: {', '.join(beyond)}")


if __name__ == "__main__":
    main()

"""Where 200 updates of the quick start's model end in each precision and with each optimizer.

    python benchmarks/precision.py [--updates 200] [--fp16]

Trains the same model on the same blocks in one process each, and prints the last training losses
(mean of the last ten updates), the held-out loss after the last, and their ratio to fp32 with
adam. --fp16 adds fp16, which takes far longer on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNS = {"fp32": [], "bf16": ["--bf16"], "fp32 8bit-adam": ["--optimizer", "8bit-adam"]}


def train(folder: Path, name: str, flags: list[str], updates: int) -> tuple[float, float, float]:
    """The mean loss of the last ten updates, the held-out loss, and seconds per update."""
    checkpoints = folder / name.replace(" ", "-")
    command = [
        sys.executable, str(ROOT / "dist_clm_train.py"), "--model-type", "gptneox",
        "--model-name", str(folder / "shards" / "small-neox"), "--num-layers", "4",
        "--embedding-dim", "192", "--task-name", str(folder / "train.jsonl"),
        "--evaluation-data", str(folder / "held_out.jsonl"), "--seq-length", "128",
        "--batch-size", "8", "--micro-batch-size", "8", "--recompute", "false",
        "--total-steps", str(updates), "--warmup-steps", "10", "--lr", "3e-3",
        "--use-cuda", "false", "--checkpoint-path", str(checkpoints), *flags,
    ]  # fmt: skip
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment())
    lines = [json.loads(line) for line in (checkpoints / "metrics.jsonl").read_text().splitlines()]
    last = [line["loss"] for line in lines[-10:]]
    seconds = sorted(line["step_seconds"] for line in lines)[len(lines) // 2]
    return sum(last) / len(last), lines[-1]["eval_loss"], seconds


def environment() -> dict[str, str]:
    return {**os.environ, "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}


def prepare(folder: Path) -> None:
    """The quick start's model, corpus and shards."""
    for command in (
        ["example_scripts/quickstart_model.py", str(folder)],
        ["convert_from_hf_gptneox.py", "--model-name", str(folder / "hf" / "small-neox"),
         "--save-dir", str(folder / "shards")],
    ):  # fmt: skip
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--fp16", action="store_true")
    args = parser.parse_args()
    runs = {**RUNS, **({"fp16": ["--fp16"]} if args.fp16 else {})}
    base: tuple[float, float] | None = None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        print(f"{'':16s}{'loss':>9s}{'ratio':>9s}{'held-out':>10s}{'ratio':>9s}{'s/update':>10s}")
        for run, flags in runs.items():
            loss, held_out, seconds = train(folder, run, flags, args.updates)
            base = base or (loss, held_out)
            print(
                f"{run:16s}{loss:9.4f}{loss / base[0]:9.4f}{held_out:10.4f}"
                f"{held_out / base[1]:9.4f}{seconds:10.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()

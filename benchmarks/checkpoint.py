"""Benchmark of checkpoints: how long training waits for a save at once, or beside training.

    python benchmarks/checkpoint.py [--megabytes 1000] [--rounds 7] [--folder DIR]

One process saves a state of --megabytes (weights, and AdamW's moments in fp32) with checksums, and
flushes the files to disk. It alternates between two kinds of save. In a save "at once", training
waits until all files are written. In a save "beside training", a thread writes the files while
training continues. In place of training, the process multiplies matrices for as long as a save
takes. In a save beside training, the stall (the time in which training waits) consists of the check
that all values are finite, the copy to host memory and, after all files are written, the renames.
After a save of either kind, the previous checkpoint is deleted beside training
(--keep-checkpoints 1). The first save of each kind is not counted, because it allocates memory. For
comparison, torch.save writes the same state to disk, with a flush but without checksums.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from checkpoint.retention import RetentionPolicy
from checkpoint.snapshot import Snapshot, to_host
from checkpoint.steps.meta import StepMeta
from checkpoint.store import CheckpointStore
from comm.backends.single_process import SingleProcessCommunicator
from comm.topology import Topology
from common.tensors import is_finite
from modules.matmul.cpu_info import CpuInfo
from pipeline_parallel.partition.split import Split

WEIGHTS = 24  # weights of the state, all of the same size
SIZE = 1024  # the multiplied matrices are (SIZE, SIZE)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--megabytes", type=int, default=1000, help="size of the state in MB (1e6 bytes)")
    add("--rounds", type=int, default=7)
    add("--folder", type=Path, help="on the disk to measure; default: a temporary folder")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"{CpuInfo.of_this_machine().name}, {os.cpu_count()} cores; a state of {args.megabytes} MB"
    )
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        measure(Path(folder), make_state(args.megabytes * 1e6), args.rounds)


def make_state(num_bytes: float) -> dict[str, Any]:
    """Returns the state of one stage: weights and two moments, 12 bytes per parameter."""
    count = int(num_bytes / 12 / WEIGHTS)
    weights, *moments = (
        {f"{i}.weight": torch.randn(count) for i in range(WEIGHTS)} for _ in range(3)
    )
    return {
        "checkpoint": weights,
        "optimizer": {"kind": "adam", "exp_avg": moments[0], "exp_avg_sq": moments[1]},
        "scheduler": {"step": 1},
    }


def measure(folder: Path, state: dict[str, Any], rounds: int) -> None:
    store = CheckpointStore(
        folder,
        control=SingleProcessCommunicator(),
        topology=Topology(0, 1, 1),
        nonce="benchmark",
        extras={},
        policy=RetentionPolicy(1, None),
    )
    snapshot, step = Snapshot(), 0
    stalls: dict[str, list[float]] = {"at once": [], "beside training": [], "torch.save": []}
    speeds: dict[str, list[float]] = {"alone": [], "beside a save": []}
    for number in range(rounds + 1):
        step += 1
        at_once = timed(partial(save, store, step, state))
        alone = train(until(time.perf_counter() + at_once))
        step += 1
        copied = timed(partial(begin_beside, store, step, state, snapshot))
        beside = train(lambda: not store.is_writing)
        renamed = timed(store.finish)
        store.finish_cleanup()
        peer = timed(partial(save_plainly, state, folder / "peer.pt"))
        if number > 0:
            for name, seconds in zip(stalls, (at_once, copied + renamed, peer), strict=True):
                stalls[name].append(seconds)
            for name, speed in zip(speeds, (alone, beside), strict=True):
                speeds[name].append(speed)
    show(stalls, speeds)


def save(store: CheckpointStore, step: int, state: dict[str, Any]) -> None:
    check(state)
    store.begin(step_meta(step), parts=to_host(state))
    store.finish()


def begin_beside(
    store: CheckpointStore, step: int, state: dict[str, Any], snapshot: Snapshot
) -> None:
    check(state)
    store.begin(step_meta(step), parts=snapshot.take(state))


def step_meta(step: int) -> StepMeta:
    return StepMeta(
        step=step,
        updates=step,
        update_step={},
        gave_up=False,
        model_type="gptneox",
        num_layers=Split([1]),
        num_replicas=1,
        flags={},
        settings={},
        versions={},
        data={},
    )


def check(state: Mapping[str, Any]) -> None:
    """Checks that all tensors are finite, as training does before it saves a checkpoint."""
    for value in state.values():
        if isinstance(value, Mapping):
            check(value)
        elif isinstance(value, torch.Tensor):
            assert is_finite(value)


def save_plainly(state: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def until(end: float) -> Callable[[], bool]:
    return lambda: time.perf_counter() > end


def train(is_over: Callable[[], bool]) -> float:
    """Multiplies matrices, once or more, until `is_over()` is true; returns products per second."""
    a = torch.ones(SIZE, SIZE)
    start, count = time.perf_counter(), 0
    while count == 0 or not is_over():
        a @ a
        count += 1
    return count / (time.perf_counter() - start)


def show(stalls: dict[str, list[float]], speeds: dict[str, list[float]]) -> None:
    for name, seconds in stalls.items():
        print(f"{name:>16s}: {median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f})")
    pairs = zip(stalls["beside training"], stalls["at once"], strict=True)
    ratios = [beside / at_once for beside, at_once in pairs]
    ratio = median(stalls["beside training"]) / median(stalls["at once"])
    print(f"stall beside training / at once: {ratio:.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    ratio = median(stalls["at once"]) / median(stalls["torch.save"])
    print(f"at once / torch.save: {ratio:.2f}")
    slower = median(speeds["beside a save"]) / median(speeds["alone"])
    print(f"speed of training beside a save / alone: {slower:.2f}")


if __name__ == "__main__":
    main()

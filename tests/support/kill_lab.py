"""A lab: a folder in which tests start runs of four ranks and examine the files of each start."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from comm.timing import DEFAULT_TIMING, Timing
from monitor.metrics import read_metrics
from tests.support.cases import to_argv
from tests.support.data import make_texts, write_jsonl
from tests.support.flags import flags_of
from tests.support.hooks import Kill, no_picture
from tests.support.launcher import free_port
from tests.support.models import make_shards
from tests.support.runs import Hook, Outcome, fork_ranks

STAGES, REPLICAS, WORLD = 2, 2, 4
WRITERS, OTHERS = (0, 1), (2, 3)  # the ranks of replica 0, and the other ranks
STEPS, SAVE, EVALUATE = 24, 4, 3


@dataclass(frozen=True)
class Start:
    """One start of all ranks, and its result.

    kill: the first kill of the start; None if there is none.
    latest: the content of rank 0's `latest`; None if there is none.
    damage: for each stage whose files in the latest checkpoint cannot be read, the error.
    begin: the step from which the run resumed; None if rank 0 ended before it could resume.
    steps: the number of lines in metrics.jsonl.
    """

    kill: Kill | None
    outcome: Outcome
    latest: str | None
    damage: list[str]
    begin: int | None
    steps: int


@dataclass(frozen=True)
class Lab:
    """A folder of runs: each run has a subfolder with its name, and all its ranks have `flags`."""

    folder: Path
    flags: Mapping[str, Any]

    @property
    def steps(self) -> int:
        return int(self.flags["total-steps"])

    def disk(self, name: str, rank: int | None = None) -> Path:
        """Returns the --checkpoint-path of all ranks, or the rank's own one if `rank` is given."""
        return self.folder / name / ("disk" if rank is None else f"disk{rank}")

    def argvs(
        self, name: str, *, own_disks: bool = False, changes: Mapping[str, Any] | None = None
    ) -> list[list[str]]:
        """Returns the ranks' command lines for one start; each call takes a new port."""
        common = {**self.flags, "dist-url": f"tcp://127.0.0.1:{free_port()}", **(changes or {})}
        disks = [self.disk(name, rank if own_disks else None) for rank in range(WORLD)]
        return [
            to_argv({**common, "rank": rank, "checkpoint-path": disk})
            for rank, disk in enumerate(disks)
        ]

    def start(
        self,
        name: str,
        *kills: Kill | None,
        own_disks: bool = False,
        changes: Mapping[str, Any] | None = None,
        timing: Timing = DEFAULT_TIMING,
    ) -> Start:
        """Forks all ranks and waits for their end; the result's `kill` is the first of `kills`."""
        argvs = self.argvs(name, own_disks=own_disks, changes=changes)
        place, hooks = self.folder / name, [kill for kill in kills if kill is not None]
        place.mkdir(exist_ok=True)  # of the ranks' output; an earlier start may have made it
        given: list[Hook] = [no_picture, *hooks]
        outcome = fork_ranks(argvs, place, hooks=given, timing=timing)
        disks = [self.disk(name, rank if own_disks else None) for rank in WRITERS]
        latest = disks[0] / "latest"
        found = [_damage_of_latest(disk, stage) for stage, disk in enumerate(disks)]
        return Start(
            kill=hooks[0] if hooks else None,
            outcome=outcome,
            latest=latest.read_text() if latest.exists() else None,
            damage=[f"stage {stage}: {one}" for stage, one in enumerate(found) if one],
            begin=_begin(outcome.told[0]),
            steps=len(read_metrics(disks[0] / "metrics.jsonl")),
        )


def _damage_of_latest(disk: Path, stage: int) -> str | None:
    """Reads the files of `stage` in the folder that `latest` names; returns the error or None."""
    if not (disk / "latest").exists():
        return None
    folder = disk / (disk / "latest").read_text()
    try:
        for part in ("checkpoint", "optimizer", "scheduler"):
            torch.load(folder / f"prank_{stage}_{part}.pt", weights_only=True)
        for name in ("meta.json", "config.json", "tokenizer.json"):
            json.loads((folder / name).read_text(encoding="utf-8"))
    except Exception as error:  # any damage
        return repr(error)
    return None


def _begin(told: list[str]) -> int | None:
    """Returns the step from which the run resumed, 0 for a new run, None if `told` has neither."""
    for line in told:
        if found := re.match(r"resumed from step (\d+)", line):
            return int(found[1])
        if "layers in" in line:
            return 0
    return None


def make_lab(folder: Path, steps: int = STEPS) -> Lab:
    """Makes a lab of runs with two weighted sources, evaluations of held-out data, and dropout."""
    write_jsonl(folder / "a.jsonl", make_texts(6, seed=1))
    write_jsonl(folder / "b.jsonl.zst", make_texts(10, seed=2))
    write_jsonl(folder / "held_out.jsonl", make_texts(12, seed=3))
    changes = {"num_hidden_layers": 3, "hidden_dropout": 0.1, "attention_dropout": 0.1}
    make_shards(folder, "model", "gptneox", changes)
    flags = f"""
        --model-name {folder}/shards/model --model-type gptneox --num-layers 2 --embedding-dim 32
        --world-size {WORLD} --pipeline-group-size {STAGES} --data-group-size {REPLICAS}
        --task-name {folder}/a.jsonl:0.3,{folder}/b.jsonl.zst:0.7 --net-interface lo
        --evaluation-data {folder}/held_out.jsonl --evaluation-steps {EVALUATE} --use-cuda false
        --seq-length 16 --batch-size 2 --micro-batch-size 1 --gradient-accumulate-step 2
        --data-workers 0 --recompute false --total-steps {steps} --warmup-steps 2 --lr 1e-3
        --checkpoint-steps {SAVE} --join-timeout 60 --dist-timeout 30
    """
    return Lab(folder, flags_of(flags))


def numbers(disk: Path) -> list[dict[str, Any]]:
    """Returns a run's metrics without times and without the marks of its restarts."""
    dropped = ("step_seconds", "tokens_per_second", "tflops", "resumed")
    lines = read_metrics(disk / "metrics.jsonl")
    return [{key: line[key] for key in line if key not in dropped} for line in lines]


def marked(disk: Path) -> list[int]:
    """Returns the steps that are marked as the first after a resume."""
    return [line["step"] for line in read_metrics(disk / "metrics.jsonl") if line.get("resumed")]


def state(disk: Path, stage: int, step: int = STEPS) -> dict[str, Any]:
    """Returns what a stage saved in the checkpoint of `step`: weights, optimizer and scheduler."""
    return {
        part: torch.load(disk / str(step) / f"prank_{stage}_{part}.pt", weights_only=True)
        for part in ("checkpoint", "optimizer", "scheduler")
    }


def same(one: Any, other: Any) -> bool:
    """Returns whether two saved states are equal, bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return bool(one == other)


def leftovers(disk: Path) -> list[str]:
    """Returns hidden files and folders except the lock; a run should leave none."""
    return sorted(path.name for path in disk.glob(".*") if path.name != ".lock")

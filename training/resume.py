"""Where a run goes on: the checkpoint that it finds, and whether it is one of this run."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from pathlib import Path

from arguments.checks import fixed_flags, free_flags
from checkpoint.resume.compatibility import changes, check_same_config, check_same_run
from checkpoint.store import CheckpointStore, ResumePoint
from comm.communicator import Communicator
from comm.objects import gather_json
from comm.topology import Topology
from optimizer.build import idle_flags
from pipeline_parallel.partition.stage_split import StageSplit
from training.trainer import TrainingStoppedError

logger = logging.getLogger(__name__)


def check_same_on_all(model_name: Path, control: Communicator) -> None:
    """ValueError, on every rank, where ranks have another config.json in `model_name`."""
    raw = json.loads((model_name / "config.json").read_text(encoding="utf-8"))
    digest = hashlib.sha256(json.dumps(raw, sort_keys=True).encode()).hexdigest()
    found = gather_json(control, digest)
    other = next((rank for rank, one in enumerate(found) if one != found[0]), None)
    if other is not None:
        raise ValueError(
            f"--model-name {model_name}: config.json is not the same on rank 0 and rank {other}"
        )


def check_success(resume: ResumePoint | None) -> None:
    """TrainingStoppedError where the run, which is at its last step, came there by giving up."""
    if resume is not None and (resume.meta or {}).get("gave_up"):
        raise TrainingStoppedError(
            f"the run gave up at its last step, {resume.step}: too many updates in a row were "
            "skipped; a larger --total-steps lets it go on"
        )


def find_resume(
    args: argparse.Namespace,
    *,
    store: CheckpointStore,
    split: StageSplit,
    topology: Topology,
    control: Communicator,
) -> ResumePoint | None:
    """The checkpoint to go on from, whole and of this run; None where there is none.

    Every process calls it. `split` becomes the one to go on with. ValueError where flags say not to
    resume, or where what is there is damaged or of another run.
    """
    if not args.load_checkpoint:
        if store.exists():
            raise ValueError(
                f"--load-checkpoint false, but --checkpoint-path {args.checkpoint_path} has a "
                "checkpoint: name another folder, or move it away"
            )
        return None
    point = store.find(split.continuation)
    if point is None or point.meta is None:
        return point
    if topology.rank == 0:  # --task-name may be another on the other ranks' machines
        check_same_run(point.meta, fixed_flags(args))
    if topology.replica == 0:
        check_same_config(point.folder, args.model_name)
    split.go_on(point.folder, point.meta, control)
    for line in changes(point.meta, free_flags(args), idle=idle_flags(args, point.meta)):
        logger.info("%s", line)
    store.verify(point)
    store.continue_from(point.step)
    return point

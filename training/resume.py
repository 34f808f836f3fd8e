"""Where a run goes on: the checkpoint that it finds, and whether it is one of this run."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from arguments.checks import fixed_flags, free_flags
from checkpoint.resume.compatibility import changes, check_same_config, check_same_run
from checkpoint.resume.reshard import Continuation, describe_change
from checkpoint.resume.saved_split import kept_split
from checkpoint.store import CheckpointStore, ResumePoint
from comm.communicator import Communicator
from comm.objects import broadcast_json, gather_json
from comm.topology import Topology
from optimizer.loss_scaler import DYNAMIC, kind_of
from pipeline_parallel.partition.split import Split
from pipeline_parallel.partition.stage_split import StageSplit
from training.trainer import TrainingStoppedError

logger = logging.getLogger(__name__)


class Resumed(NamedTuple):
    """The checkpoint to continue; the split of the layers now (`layers`) and then (`source`)."""

    point: ResumePoint | None
    layers: Split
    source: Split


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
) -> Resumed:
    """Finds the checkpoint that the run continues, and the split of its layers from now on.

    Every process calls it.

    Returns:
        The checkpoint (None if there is none), the run's split and the checkpoint's. The split of a
        predecessor's checkpoint must be the run's own.

    Raises:
        ValueError: the flags forbid a resume, or the checkpoint is damaged or of another run.
    """
    continuation = Continuation(split.asked, split.layers)
    if not args.load_checkpoint:
        if store.exists():
            raise ValueError(
                f"--load-checkpoint false, but --checkpoint-path {args.checkpoint_path} has a "
                "checkpoint: name another folder, or move it away"
            )
        return Resumed(None, split.layers, split.layers)
    point = store.find(continuation)
    if point is None or point.meta is None:
        return Resumed(point, split.layers, split.layers)
    if topology.rank == 0:  # --task-name may be another on the other ranks' machines
        check_same_run(point.meta, fixed_flags(args))
    if topology.replica == 0:
        check_same_config(point.folder, args.model_name)
    source = _saved_split(point, control, num_layers=sum(split.layers))
    layers = continuation.split_after(source)
    if topology.rank == 0 and layers != source:
        logger.info("%s", describe_change(source, layers))
    elif topology.rank == 0 and layers != split.layers:
        logger.info(
            "--num-layers %s would be %s now: the checkpoint's %s is kept",
            split.asked,
            split.layers,
            source,
        )
    for line in changes(point.meta, free_flags(args), idle=idle_flags(args, point.meta)):
        logger.info("%s", line)
    store.verify(point)
    store.continue_from(point.step)
    return Resumed(point, layers, source)


def _saved_split(point: ResumePoint, control: Communicator, *, num_layers: int) -> Split:
    """Returns the split of a checkpoint, from rank 0's meta.json, on every rank."""
    saved = None
    if control.rank == 0:
        assert point.meta is not None
        saved = kept_split(point.folder / "meta.json", point.meta, num_layers)
    return Split(broadcast_json(control, saved))


def idle_flags(args: argparse.Namespace, meta: Mapping[str, Any]) -> set[str]:
    """The flags of loss scales that do nothing in a run that goes on from a checkpoint."""
    dynamic = {"--initial-loss-scale", "--min-loss-scale", "--loss-scale-window", "--hysteresis"}
    if args.precision != "fp16":
        return dynamic | {"--loss-scale", "--max-skipped-updates"}
    if args.loss_scale > 0:
        return dynamic
    goes_on = kind_of(meta["updater"]["scaler"]) == DYNAMIC
    return {"--initial-loss-scale"} if goes_on else set()

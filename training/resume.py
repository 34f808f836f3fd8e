"""The search for the checkpoint that a run continues, and the check that it fits the run."""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from arguments.flag_table import fixed_defaults, fixed_flags, free_flags
from arguments.settings import PrecisionSettings, Settings
from checkpoint.resume.compatibility import check_same_config, check_same_run, describe_changes
from checkpoint.resume.reshard import ResumeSplit, describe_change
from checkpoint.resume.saved_split import saved_split
from checkpoint.store import CheckpointStore, ResumePoint
from comm.run_context import RunContext
from optimizer.loss_scaler import DYNAMIC
from pipeline_parallel.partition.split import Split
from pipeline_parallel.partition.stage_split import StageSplit

logger = logging.getLogger(__name__)


class Resumed(NamedTuple):
    """The checkpoint from which a run resumes, and the splits of the layers.

    Attributes:
        point: the checkpoint; None if the run starts without one.
        layers: the split that the run uses.
        source: the split with which the checkpoint was saved.
    """

    point: ResumePoint | None
    layers: Split
    source: Split


def find_resume(
    settings: Settings, context: RunContext, *, store: CheckpointStore, split: StageSplit
) -> Resumed:
    """Returns the checkpoint from which the run resumes, and the splits of run and checkpoint.

    Every process must call this function. The checkpoint of an older system (a predecessor, see
    docs/glossary.md) must have the same split as the run.

    Raises:
        ValueError: there is a checkpoint although --load-checkpoint is false, or the checkpoint is
            damaged or does not fit the run.
    """
    resume_split = ResumeSplit(split.asked, split.layers)
    if not settings.checkpoint.load_checkpoint:
        if store.exists():
            raise ValueError(
                "--load-checkpoint false, but --checkpoint-path "
                f"{settings.checkpoint.checkpoint_path} has a checkpoint: name another folder, or "
                "move it away"
            )
        return Resumed(None, split.layers, split.layers)
    point = store.find(resume_split)
    if point is None or point.meta is None:
        return Resumed(point, split.layers, split.layers)
    if context.rank == 0:  # --task-name may have another value on the other ranks' machines
        check_same_run(point.meta, fixed_flags(settings), defaults=fixed_defaults())
    if context.topology.replica == 0:
        check_same_config(point.folder, settings.model.model_name)
    source = saved_split(point.meta, point.folder, model_layers=sum(split.layers))
    layers = resume_split.after(source)
    if context.rank == 0 and layers != source:
        logger.info("%s", describe_change(source, layers))
    elif context.rank == 0 and layers != split.layers:
        kept = f"the run keeps the checkpoint's {source}"
        logger.info("--num-layers %s would give %s now, but %s", split.asked, split.layers, kept)
    idle = idle_flags(settings.precision, point.meta.update_step["scaler"])
    for line in describe_changes(point.meta.settings, free_flags(settings), idle=idle):
        logger.info("%s", line)
    store.verify(point)
    store.update_latest(point.step)
    return Resumed(point, layers, source)


def idle_flags(precision: PrecisionSettings, scaler: Mapping[str, Any]) -> set[str]:
    """Returns the loss-scale flags that a run ignores if it restores the scaler state `scaler`."""
    dynamic = {"--initial-loss-scale", "--min-loss-scale", "--loss-scale-window", "--hysteresis"}
    if not precision.fp16:
        return dynamic | {"--loss-scale", "--max-skipped-updates"}
    if precision.loss_scale > 0:
        return dynamic
    return {"--initial-loss-scale"} if scaler["kind"] == DYNAMIC else set()

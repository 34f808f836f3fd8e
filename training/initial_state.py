"""The first weights and optimizer state of a run: from layer shards, a seed or a checkpoint."""

import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from arguments.settings import Settings
from checkpoint.files.layer_shards import has_manifest
from checkpoint.files.validation import module_shapes
from checkpoint.resume.load import (
    initialise_model_,
    load_checkpoint_,
    load_shards_,
    share_from_first,
)
from checkpoint.resume.reshard import map_names, stages_holding
from checkpoint.store import part_file, read_part
from comm.collective_io import run_on_all
from comm.run_context import RunContext
from common.tensors import DTYPES
from data_parallel.broadcast import same_on_all
from modules.stage_model import StageModel
from optimizer.saved_state import SavedState
from optimizer.state_dict import restore_state
from optimizer.update import UpdateStep
from pipeline_parallel.partition.split import stage_modules
from training.run_start import RunStart

logger = logging.getLogger(__name__)


def load_weights_(
    model: StageModel,
    settings: Settings,
    context: RunContext,
    start: RunStart,
) -> None:
    """Fills the stage's model, which is in fp32; all replicas then hold the same weights.

    The other ranks wait however long a disk takes.

    Raises:
        ValueError: a file cannot be used, or replicas have different files.
    """
    topology, control, replicas = context.topology, context.control, context.groups.replicas
    family, config, resume = start.family, start.config, start.point
    model_name, dtype = settings.model.model_name, DTYPES[settings.precision.precision]
    if resume is None:
        if settings.model.load_pretrained_model:
            if topology.rank == 0 and not has_manifest(model_name):
                logger.info("%s has no manifest.json: not verified", model_name)
            read = partial(load_shards_, model, model_name, family, config, dtype=dtype)
            run_on_all(control, read, f"reading {model_name}", expected=())
        else:
            initialise_model_(model, config, seed=settings.update.seed)
        if not same_on_all(model.parameters(), replicas):
            raise ValueError(
                f"--model-name {model_name}: the shards of stage {topology.stage} are not the "
                "same for all replicas"
            )
        return
    read = partial(
        load_checkpoint_, model, resume.folder, start.source, family, config, dtype=dtype
    )
    first = topology.replica == 0
    run_on_all(control, read if first else None, f"reading {resume.folder}", expected=())
    share_from_first(model.parameters(), replicas)
    if resume.meta is None:
        logger.info("weights from %s alone: step 0, fresh optimizer", resume.folder)


def load_state_(
    update_step: UpdateStep, context: RunContext, start: RunStart, *, indices: range
) -> None:
    """Fills the optimizer and the loss scale from the run's checkpoint, if there is one.

    `indices` are the modules of this stage. A predecessor's checkpoint leaves both as they are.
    """
    topology, control, resume = context.topology, context.control, start.point

    def keys(index: int) -> Iterable[str]:
        return module_shapes(start.family, start.config, index)

    if resume is None or resume.meta is None:
        return
    folder, first, states = resume.folder, topology.replica == 0, list[SavedState]()

    def read() -> None:
        for stage in stages_holding(indices, start.source):
            held = stage_modules(stage, start.source)
            states.append(_read_state(folder, stage, held, indices, keys))

    run_on_all(control, read if first else None, f"opening the state in {folder}", expected=())
    restore_state(
        update_step.optimizer,
        states if first else None,
        control,
        topology,
        updates=resume.meta.updates,
    )
    update_step.load_state(resume.meta.update_step)
    logger.info("resumed from step %d of %s", resume.step, resume.folder.parent)


def _read_state(
    folder: Path, stage: int, held: range, indices: range, keys: Callable[[int], Iterable[str]]
) -> SavedState:
    """What a checkpoint's stage, which has the modules `held`, kept for one that has `indices`."""
    return SavedState(
        part_file(folder, stage, "optimizer"),
        read_part(folder, stage, "optimizer"),
        names=map_names(held, held, keys).keys(),
        saved_names=map_names(held, indices, keys),
    )

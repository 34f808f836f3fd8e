"""The initial weights and optimizer state of a run: from layer shards, a seed or a checkpoint."""

import logging
from collections.abc import Iterable
from functools import partial

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
from checkpoint.steps.manifest import part_name
from checkpoint.store import read_part
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
    model: StageModel, settings: Settings, context: RunContext, start: RunStart
) -> None:
    """Sets the weights of this stage's fp32 model, which are the same on all replicas of the stage.

    Raises:
        ValueError: a file is missing or invalid, or replicas have different files.
    """
    topology, control, replicas = context.topology, context.control, context.groups.replicas
    family, config, resume = start.family, start.config, start.point
    model_name, dtype = settings.model.model_name, DTYPES[settings.precision.precision]
    if resume is None:
        if settings.model.load_pretrained_model:
            if topology.rank == 0 and not has_manifest(model_name):
                logger.info("%s has no manifest.json: its files are not verified", model_name)
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
        logger.info(
            "only the weights come from %s: training starts at step 0 with a new optimizer state",
            resume.folder,
        )


def load_state_(
    update_step: UpdateStep, context: RunContext, start: RunStart, *, indices: range
) -> None:
    """Restores the optimizer and the loss scale from the checkpoint, if the run resumes.

    `indices` are the numbers of this stage's modules. A checkpoint of an older system (a
    predecessor, see docs/glossary.md) changes neither the optimizer nor the loss scale.
    """
    topology, control, resume = context.topology, context.control, start.point
    if resume is None or resume.meta is None:
        return
    folder, first, states = resume.folder, topology.replica == 0, list[SavedState]()

    def keys(index: int) -> Iterable[str]:
        return module_shapes(start.family, start.config, index)

    def read() -> None:
        for stage in stages_holding(indices, start.source):
            path, saved = folder / part_name(stage, "optimizer"), stage_modules(stage, start.source)
            names, needed = map_names(saved, saved, keys), map_names(saved, indices, keys)
            part = read_part(path)
            states.append(SavedState(path, part, names=names.keys(), saved_names=needed))

    run_on_all(control, read if first else None, f"opening the state in {folder}", expected=())
    saved_states, updates = states if first else None, resume.meta.updates
    restore_state(update_step.optimizer, saved_states, control, topology, updates=updates)
    update_step.load_state(resume.meta.update_step)
    logger.info("resumed from step %d of %s", resume.step, resume.folder.parent)

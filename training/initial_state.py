"""Where a run's weights and optimizer state come from: layer shards, a seed, or a checkpoint."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from checkpoint.files.layer_shards import has_manifest
from checkpoint.resume.load import (
    initialise_model_,
    load_checkpoint_,
    load_shards_,
    share_from_first,
)
from checkpoint.resume.reshard import names_in, stages_holding
from checkpoint.store import ResumePoint, part_file, read_part
from comm.collective_io import run_on_all
from comm.communicator import Communicator
from comm.topology import Topology
from common.tensors import DTYPES
from data_parallel.broadcast import same_on_all
from modules.families.base import Family
from modules.stage_model import StageModel
from optimizer.mixed_precision import MixedPrecisionOptimizer
from optimizer.state_dict import KeptState, restore_state
from optimizer.update import UpdateStep
from pipeline_parallel.partition.split import Split, stage_modules

logger = logging.getLogger(__name__)


def load_weights_(
    model: StageModel,
    args: argparse.Namespace,
    resume: ResumePoint | None,
    *,
    family: Family,
    config: Any,
    topology: Topology,
    control: Communicator,
    replicas: Communicator,
    source: Split,
) -> None:
    """Fills the stage's model, which is in fp32; all replicas then hold the same. `source` is how a
    checkpoint is split.

    ValueError for files that cannot be used, or that differ between replicas. However long a disk
    takes, the others wait.
    """
    dtype = DTYPES[args.precision]
    if resume is None:
        if args.load_pretrained_model:
            if topology.rank == 0 and not has_manifest(args.model_name):
                logger.info("%s has no manifest.json: not verified", args.model_name)
            read = partial(load_shards_, model, args.model_name, family, config, dtype=dtype)
            run_on_all(control, read, f"reading {args.model_name}", expected=())
        else:
            initialise_model_(model, config, seed=args.seed)
        if not same_on_all(model.parameters(), replicas):
            raise ValueError(
                f"--model-name {args.model_name}: the shards of stage {topology.stage} are not the "
                "same for all replicas"
            )
        return
    read = partial(load_checkpoint_, model, resume.folder, source, family, config, dtype=dtype)
    first = topology.replica == 0
    run_on_all(control, read if first else None, f"reading {resume.folder}", expected=())
    share_from_first(model.parameters(), replicas)
    if resume.meta is None:
        logger.info("weights from %s alone: step 0, fresh optimizer", resume.folder)


def load_state_(
    optimizer: MixedPrecisionOptimizer,
    updater: UpdateStep,
    resume: ResumePoint | None,
    *,
    topology: Topology,
    control: Communicator,
    indices: range,
    keys: Callable[[int], Iterable[str]],
    source: Split,
) -> None:
    """Fills optimizer and updater from a checkpoint of ours, which is split as `source`; else
    leaves them as they are.

    The stage has the model's modules `indices`; `keys` names the weights of a module.
    """
    if resume is None or resume.meta is None:
        return
    folder, first, states = resume.folder, topology.replica == 0, list[KeptState]()

    def read() -> None:
        for stage in stages_holding(indices, source):
            held = stage_modules(stage, source)
            states.append(_read_state(folder, stage, held, indices, keys))

    run_on_all(control, read if first else None, f"opening the state in {folder}", expected=())
    restore_state(
        optimizer, states if first else None, control, topology, updates=resume.meta["updates"]
    )
    updater.load_state(resume.meta["updater"])
    logger.info("resumed from step %d of %s", resume.step, resume.folder.parent)


def _read_state(
    folder: Path, stage: int, held: range, indices: range, keys: Callable[[int], Iterable[str]]
) -> KeptState:
    """What a checkpoint's stage, which has the modules `held`, kept for one that has `indices`."""
    return KeptState(
        part_file(folder, stage, "optimizer"),
        read_part(folder, stage, "optimizer"),
        names=names_in(held, held, keys).keys(),
        taken=names_in(held, indices, keys),
    )

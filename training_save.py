"""Saving a step of a run: what a checkpoint holds, and whether a run goes on without it."""

from __future__ import annotations

import argparse
import logging
import platform
from collections.abc import Mapping
from typing import Any

import torch
import transformers

from argument_checks import fixed_flags, free_flags
from checkpoint.training_state import CheckpointStore, SaveFailedError
from comm.communicator import Communicator
from comm.topology import Topology
from modules.stage_model import StageModel
from optimizer.mixed_precision import MixedPrecisionOptimizer
from optimizer.state import collect_state
from optimizer.updater import Updater

logger = logging.getLogger(__name__)


def save_step(
    args: argparse.Namespace,
    step: int,
    *,
    is_last: bool,
    store: CheckpointStore,
    topology: Topology,
    control: Communicator,
    model: StageModel,
    optimizer: MixedPrecisionOptimizer,
    updater: Updater,
    kept: Mapping[str, Any],
) -> bool:
    """Whether the step is saved now; every process calls it. `kept` goes to meta.json too.

    SaveFailedError, the same on all, where the run is not to go on after a save that failed: it
    ends with this one (`is_last`), or --checkpoint-failure says so.
    """
    numbers = {"step": step, "updates": optimizer.updates}
    meta = {
        **numbers,
        "updater": updater.state(),
        "gave_up": updater.has_given_up,
        "model_type": args.model_type,
        "num_stages": topology.num_stages,
        "num_replicas": topology.num_replicas,
        "flags": fixed_flags(args),
        "settings": free_flags(args),
        "versions": _versions(),
        **kept,
    }
    parts = {
        "checkpoint": {key: value.cpu() for key, value in model.state_dict().items()},
        "optimizer": collect_state(optimizer, control, topology),
        "scheduler": {"kind": args.lr_schedule, **numbers, **updater.state()},
    }
    try:
        store.save(step, parts=parts, meta=meta)
    except SaveFailedError as error:
        if is_last or args.checkpoint_failure == "fatal":
            raise
        if topology.rank == 0:
            logger.warning("%s; training goes on, and checkpoints are as they were", error)
        return False
    logger.info("saved step %d in %s", step, args.checkpoint_path)
    return True


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }

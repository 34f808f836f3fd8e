"""Saving a run's steps: whether there is room, what a checkpoint holds, when it is written, and
whether a run goes on without it."""

from __future__ import annotations

import argparse
import logging
import platform
import shutil
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from arguments.checks import fixed_flags, free_flags
from checkpoint.snapshot import Snapshot, on_host
from checkpoint.store import CheckpointStore, SaveFailedError
from comm.communicator import Communicator
from comm.objects import gather_json
from comm.topology import Topology
from common.text import format_bytes
from modules.stage_model import StageModel
from optimizer.build import checkpoint_bytes
from optimizer.mixed_precision import MixedPrecisionOptimizer
from optimizer.state_dict import collect_state
from optimizer.update import UpdateStep

logger = logging.getLogger(__name__)


def check_room(
    args: argparse.Namespace,
    *,
    store: CheckpointStore,
    control: Communicator,
    model: StageModel,
    done: int,
) -> None:
    """ValueError, on every rank, where a disk has no room for what will be saved of this stage
    after `done` steps; every process calls it."""
    every = args.checkpoint_steps or args.total_steps
    every = max(every, args.gradient_accumulate_step)  # saves wait for an update's end
    saves = -(-(args.total_steps - done) // every)
    weights, state = checkpoint_bytes(args, sum(p.numel() for p in model.parameters()))
    needed = store.bytes_to_come(saves, weights=weights, state=state)
    check_disk(control, args.checkpoint_path, needed=needed)


class Saver:
    """Saves steps; every process calls all of it alike.

    With --async-checkpoint a step is copied to host memory and written beside training; that memory
    is made here. `kept` gives what else goes to meta.json.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        *,
        store: CheckpointStore,
        topology: Topology,
        control: Communicator,
        model: StageModel,
        optimizer: MixedPrecisionOptimizer,
        updater: UpdateStep,
        kept: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._args, self._store, self._topology, self._control = args, store, topology, control
        self._model, self._optimizer, self._updater = model, optimizer, updater
        self._kept = kept
        self._snapshot = Snapshot() if args.async_checkpoint else None
        if self._snapshot is not None:
            self._parts(0)

    @property
    def is_pending(self) -> bool:
        """Whether a step was begun and is not saved yet."""
        return self._store.pending is not None

    @property
    def is_writing(self) -> bool:
        """Whether this process still writes what is pending."""
        return self._store.is_writing

    def save(self, step: int, data: Mapping[str, Any], *, is_last: bool) -> bool:
        """Whether the step is saved now; it may be pending instead, unless the run ends with it.

        Nothing is pending before. SaveFailedError, the same on all, where the run is not to go on
        after a save that failed: it is the run's last, or --checkpoint-failure says so.
        """
        self._store.begin(step, parts=self._parts(step), meta=self._meta(step, data), hurry=is_last)
        if self._snapshot is not None and not is_last:
            return False
        return self.finish(is_last=is_last)

    def finish(self, *, is_last: bool = False) -> bool:
        """Whether what is pending is saved now; waits for it. SaveFailedError as in `save`."""
        step = self._store.pending
        try:
            self._store.finish(hurry=is_last)
        except SaveFailedError as error:
            if is_last or self._args.checkpoint_failure == "fatal":
                raise
            if self._topology.rank == 0:
                logger.warning("%s; training goes on", error)
            return False
        logger.info("saved step %s in %s", step, self._args.checkpoint_path)
        return True

    def close(self) -> None:
        """Waits until what saves have dropped is removed; every process calls it."""
        self._store.tidy()

    def _parts(self, step: int) -> dict[str, Any]:
        """This stage's state in host memory; a process that writes none leaves it where it is."""
        parts = {
            "checkpoint": self._model.state_dict(),
            "optimizer": collect_state(self._optimizer, self._control, self._topology),
            "scheduler": {
                "kind": self._args.lr_schedule,
                **self._numbers(step),
                **self._updater.state(),
            },
        }
        if self._topology.replica != 0:
            return parts
        return on_host(parts) if self._snapshot is None else self._snapshot.take(parts)

    def _numbers(self, step: int) -> dict[str, int]:
        return {"step": step, "updates": self._optimizer.updates}

    def _meta(self, step: int, data: Mapping[str, Any]) -> dict[str, Any]:
        return {
            **self._numbers(step),
            "updater": self._updater.state(),
            "gave_up": self._updater.has_given_up,
            "model_type": self._args.model_type,
            "num_stages": self._topology.num_stages,
            "num_replicas": self._topology.num_replicas,
            "flags": fixed_flags(self._args),
            "settings": free_flags(self._args),
            "versions": _versions(),
            "data": data,
            **self._kept(),
        }


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def check_disk(control: Communicator, path: Path, *, needed: int) -> None:
    """Every process calls it with the bytes it will write under `path`, which may not exist yet.

    ValueError where the processes of this machine together need more than is free.
    """
    existing = next(folder for folder in (path, *path.resolve().parents) if folder.exists())
    here = [socket.gethostname(), existing.stat().st_dev]
    wants = gather_json(control, [here, needed])
    total = sum(want for where, want in wants if where == here)
    free = shutil.disk_usage(existing).free
    if needed and total > free:
        raise ValueError(
            f"--checkpoint-path {path}: the checkpoints of this run need {format_bytes(total)} on "
            f"this machine, {format_bytes(free)} is free; save less often, keep fewer "
            "(--keep-checkpoints) or make room"
        )

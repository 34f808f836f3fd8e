"""Writing of checkpoints: their content, the needed disk space, and the effect of a failed save."""

import logging
import platform
import shutil
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from arguments.flag_table import fixed_flags, free_flags
from arguments.settings import Settings
from checkpoint.snapshot import Snapshot, to_host
from checkpoint.steps.meta import StepMeta
from checkpoint.store import CheckpointStore, SaveFailedError
from comm.communicator import Communicator
from comm.objects import gather_json
from comm.run_context import RunContext
from common.text import format_bytes
from modules.stage_model import StageModel
from optimizer.build import checkpoint_bytes
from optimizer.state_dict import collect_state
from optimizer.update import UpdateStep

logger = logging.getLogger(__name__)


def check_room(
    settings: Settings,
    store: CheckpointStore,
    control: Communicator,
    *,
    model: StageModel,
    done: int,
) -> None:
    """Checks that the disks have space for the checkpoints that are saved after step `done`.

    Every process calls it.

    Raises:
        ValueError: on every rank, if a disk has too little space.
    """
    update, path = settings.update, settings.checkpoint.checkpoint_path
    every = settings.checkpoint.checkpoint_steps or update.total_steps
    every = max(every, update.gradient_accumulate_step)  # a save waits for the end of an update
    saves = -(-(update.total_steps - done) // every)
    weights, state = checkpoint_bytes(
        sum(p.numel() for p in model.parameters()),
        precision=settings.precision.precision,
        optimizer=update.optimizer,
    )
    check_disk(control, path, needed=store.needed_bytes(saves, weights=weights, state=state))


class Saver:
    """The writer of checkpoints; every process calls each method.

    With --async-checkpoint, `save` copies the state to host memory, and training continues while
    the copy is written to disk. The constructor allocates the memory of the copy.

    Args:
        extra_meta: a function that returns additional fields of meta.json.
    """

    def __init__(
        self,
        settings: Settings,
        context: RunContext,
        *,
        store: CheckpointStore,
        model: StageModel,
        update_step: UpdateStep,
        extra_meta: Callable[[], Mapping[str, Any]],
    ) -> None:
        self._settings, self._store = settings, store
        self._topology, self._control = context.topology, context.control
        self._model, self._update_step, self._extra_meta = model, update_step, extra_meta
        self._snapshot = Snapshot() if settings.checkpoint.async_checkpoint else None
        if self._snapshot is not None:
            self._parts(0)

    @property
    def is_pending(self) -> bool:
        """Returns whether the save of a checkpoint has begun and is not finished."""
        return self._store.pending is not None

    @property
    def is_writing(self) -> bool:
        """Returns whether this process still writes its files of the checkpoint."""
        return self._store.is_writing

    def save(self, step: int, data: Mapping[str, Any], *, is_last: bool) -> bool:
        """Saves the checkpoint of a step; returns whether the checkpoint is complete.

        The previous save must be finished. With --async-checkpoint, this save is not finished when
        the method returns, unless `is_last` is true.

        Raises:
            SaveFailedError: the save failed; raised on all ranks, but only if `is_last` is true
                or if --checkpoint-failure is fatal.
        """
        self._store.begin(self._meta(step, data), parts=self._parts(step))
        if self._snapshot is not None and not is_last:
            return False
        return self.finish(is_last=is_last)

    def finish(self, *, is_last: bool = False) -> bool:
        """Waits until the save ends; returns whether it succeeded. Raises errors as `save` does."""
        step = self._store.pending
        try:
            self._store.finish()
        except SaveFailedError as error:
            if is_last or self._settings.checkpoint.checkpoint_failure == "fatal":
                raise
            if self._topology.rank == 0:
                logger.warning("%s; training continues", error)
            return False
        logger.info("saved step %s in %s", step, self._settings.checkpoint.checkpoint_path)
        if not is_last:
            self._store.start_cleanup()
        return True

    def close(self) -> None:
        """Deletes the checkpoints beyond --keep-checkpoints, and returns when they are deleted."""
        self._store.finish_cleanup()

    def _parts(self, step: int) -> dict[str, Any]:
        """Returns this stage's state; replica 0, which writes it, gets a copy in host memory."""
        parts = {
            "checkpoint": self._model.state_dict(),
            "optimizer": collect_state(self._update_step.optimizer, self._control, self._topology),
            "scheduler": {
                "kind": self._settings.update.lr_schedule,
                "step": step,
                "updates": self._update_step.optimizer.updates,
                **self._update_step.state(),
            },
        }
        if self._topology.replica != 0:
            return parts
        return to_host(parts) if self._snapshot is None else self._snapshot.take(parts)

    def _meta(self, step: int, data: Mapping[str, Any]) -> StepMeta:
        return StepMeta(
            step=step,
            updates=self._update_step.optimizer.updates,
            update_step=self._update_step.state(),
            gave_up=self._update_step.has_given_up,
            model_type=self._settings.model.model_type,
            num_replicas=self._topology.num_replicas,
            flags=fixed_flags(self._settings),
            settings=free_flags(self._settings),
            versions={
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            data=data,
            **self._extra_meta(),
        )


def check_disk(control: Communicator, path: Path, *, needed: int) -> None:
    """Raises ValueError if this machine's processes need more bytes than are free at `path`.

    Every process calls it; `needed` is the number of bytes that this process will write. `path`
    need not exist.
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

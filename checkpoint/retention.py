"""Deletion of old checkpoints (steps), and of the optimizer state in old steps that are kept.

The deletion starts when a new step is complete on every stage and the file `latest` names this
step. Only earlier steps are deleted. An incomplete earlier step is deleted too, and does not count
as a kept step. A folder is renamed before it is deleted, and a manifest lists a file as dropped
before the file is deleted. So after a crash at any moment, a step is complete, or deleted, or its
manifest says which files were dropped.
"""

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from checkpoint.steps.complete import find_complete_steps
from checkpoint.steps.folder import delete_replaced, delete_step, step_folders
from checkpoint.steps.manifest import StageManifest, manifest_stages, part_name, read_manifest
from comm.collective_io import BackgroundTask, run_on_all
from comm.communicator import Communicator
from comm.objects import gather_json
from common.files import replace_file

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RetentionPolicy:
    """The number of newest steps to keep, and how many of them keep their optimizer state.

    If `steps` is None, all steps are kept. If `optimizer_states` is None, every kept step keeps its
    optimizer state.
    """

    steps: int | None = None
    optimizer_states: int | None = None

    def added_bytes(self, saves: int, *, present: tuple[int, int], weights: int, state: int) -> int:
        """Returns how many free bytes on the disk are enough to save `saves` more checkpoints.

        Args:
            saves: the number of checkpoints; after each, old steps are deleted as the policy says.
            present: the number of steps on disk now, and how many of them have optimizer state.
            weights: the bytes of the weights in one step.
            state: the bytes of the optimizer state in one step.
        """
        limits = [most for most in (self.steps, self.optimizer_states) if most is not None]
        steps, states = (  # a new step is written before an old one is deleted
            saves if most is None else min(saves, max(1, most + 1 - on_disk))
            for most, on_disk in ((self.steps, present[0]), (min(limits, default=None), present[1]))
        )
        return steps * weights + states * state


class StepDeleter:
    """Background deletion of the steps under `path` that `policy` does not keep.

    Except for the property `running`, the methods are collective: all processes must call them
    together. `path` is None for a process that writes no checkpoints.
    """

    def __init__(
        self, path: Path | None, policy: RetentionPolicy, *, control: Communicator, nonce: str
    ) -> None:
        self._path, self._policy, self._control, self._nonce = path, policy, control, nonce
        self._saved: int | None = None  # the newest step, until a deletion starts
        self._deleted_before: int | None = None
        self._task: BackgroundTask | None = None

    def note_saved(self, step: int) -> None:
        """Records that `step` was saved; the next call of `start` deletes old steps."""
        self._saved = step

    @property
    def running(self) -> BackgroundTask | None:
        """Returns the deletion that still runs in this process, or None."""
        return None if self._task is None or self._task.has_ended else self._task

    def start(self) -> None:
        """Starts to delete old steps if a new step was saved since the last deletion.

        If an earlier deletion still runs on any process, this call does nothing, and a later call
        starts the new deletion.
        """
        if self._saved is None or any(gather_json(self._control, self.running is not None)):
            return
        self.wait()
        step, self._saved, complete = self._saved, None, None
        if self._policy != RetentionPolicy():  # the default policy keeps all steps
            complete = find_complete_steps(self._path, step, control=self._control)
        if self._path is not None:
            self._task = BackgroundTask(partial(self._delete, self._path, step, complete or []))
        self._deleted_before = step

    def wait(self) -> None:
        """Waits until the deletion has ended on all processes; rank 0 logs a warning on errors."""
        if self._deleted_before is None:
            return
        name = f"removing checkpoints older than step {self._deleted_before}"
        failure = run_on_all(self._control, self._task, name)
        self._task = self._deleted_before = None
        if failure is not None and self._control.rank == 0:
            logger.warning("older checkpoints could not be removed: %s", failure)

    def finish(self) -> None:
        """Deletes all steps that the policy does not keep, and waits until they are deleted."""
        self.wait()
        self.start()
        self.wait()

    def _delete(self, path: Path, step: int, complete: Sequence[int]) -> None:
        delete_replaced(path / str(step), self._nonce)
        if step in complete:
            delete_old_steps(path, step, self._policy, complete=complete, nonce=self._nonce)


def delete_old_steps(
    path: Path, step: int, policy: RetentionPolicy, *, complete: Sequence[int], nonce: str
) -> None:
    """Deletes the steps up to `step` that `policy` does not keep.

    In the steps that stay, it deletes the optimizer states that `policy` does not keep. It deletes
    the files of all stages, also of stages that the run no longer has. Stages that share a folder
    can call it at the same time. A folder without any stage's files may belong to the user, so it
    is not deleted.

    Args:
        path: the folder of the steps.
        step: the step that was just saved.
        policy: the numbers of steps and of optimizer states to keep.
        complete: the complete steps in ascending order; `step` is the last.
        nonce: an id of this start of the program, the same for all processes.

    Raises:
        OSError: the disk fails.
    """
    steps = [s for s in step_folders(path) if s <= step and any(path.glob(f"{s}/prank_*"))]
    for old in _all_but_newest(steps, complete, policy.steps):
        delete_step(path / str(old), nonce)
    for old in _all_but_newest(steps, complete, policy.optimizer_states):
        for stage in manifest_stages(path / str(old)):
            with suppress(ValueError):  # a damaged manifest cannot record the dropped file
                _drop_optimizer(path / str(old), read_manifest(path / str(old), stage))


def _all_but_newest(steps: Sequence[int], complete: Sequence[int], most: int | None) -> list[int]:
    return [] if most is None else [step for step in steps if step not in complete[-most:]]


def _drop_optimizer(folder: Path, manifest: StageManifest) -> None:
    name = part_name(manifest.stage, "optimizer")
    if name not in manifest.dropped:
        files = {file: file_sum for file, file_sum in manifest.files.items() if file != name}
        updated = replace(manifest, files=files, dropped=[*manifest.dropped, name])
        replace_file(folder / manifest.name, updated.encode())
    (folder / name).unlink(missing_ok=True)

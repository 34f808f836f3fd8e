"""Deletion of older steps, and of the optimizer state of those that stay.

Only steps before the one that was just saved are touched, once it is complete on every stage and
`latest` names it. A step that is not complete on every stage does not count, and is deleted too. A
folder is renamed before it is deleted, and a manifest says that a file is dropped before the file
is deleted: a crash at any moment leaves a step complete, gone, or marked.
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
    """How many of the newest steps stay, and how many with optimizer state; None is all."""

    steps: int | None = None
    optimizer_states: int | None = None

    def added_bytes(self, saves: int, *, present: tuple[int, int], weights: int, state: int) -> int:
        """Returns the most bytes that `saves` further checkpoints add at any time.

        Args:
            present: the number of steps on disk, and of those with optimizer state.
            weights: bytes of one step's weights.
            state: bytes of one step's optimizer state.
        """
        limits = [most for most in (self.steps, self.optimizer_states) if most is not None]
        steps, states = (  # a new step is written before an old one is deleted
            saves if most is None else min(saves, max(1, most + 1 - on_disk))
            for most, on_disk in ((self.steps, present[0]), (min(limits, default=None), present[1]))
        )
        return steps * weights + states * state


class StepDeleter:
    """Deletes older steps under `path` in the background, as `policy` says.

    Every process calls all of it alike but for `running`; `path` is None for a process that writes
    no checkpoints.
    """

    def __init__(
        self, path: Path | None, policy: RetentionPolicy, *, control: Communicator, nonce: str
    ) -> None:
        self._path, self._policy, self._control, self._nonce = path, policy, control, nonce
        self._saved: int | None = None  # the newest step for which nothing was deleted yet
        self._deleted_before: int | None = None
        self._task: BackgroundTask | None = None

    def note_saved(self, step: int) -> None:
        """Lets the next `start` delete what `step` makes superfluous."""
        self._saved = step

    @property
    def running(self) -> BackgroundTask | None:
        """The deletion that still runs in this process, if any."""
        return None if self._task is None or self._task.has_ended else self._task

    def start(self) -> None:
        """Starts to delete, unless an earlier deletion still runs anywhere: the next call does."""
        if self._saved is None or any(gather_json(self._control, self.running is not None)):
            return
        self.wait()
        step, self._saved, complete = self._saved, None, None
        if self._policy != RetentionPolicy():  # which keeps all
            complete = find_complete_steps(self._path, step, control=self._control)
        if self._path is not None:
            self._task = BackgroundTask(partial(self._delete, self._path, step, complete or []))
        self._deleted_before = step

    def wait(self) -> None:
        """Waits until the deletion has ended on all processes; rank 0 warns if it failed."""
        if self._deleted_before is None:
            return
        name = f"removing what is older than step {self._deleted_before}"
        failure = run_on_all(self._control, self._task, name)
        self._task = self._deleted_before = None
        if failure is not None and self._control.rank == 0:
            logger.warning("older checkpoints could not be removed: %s", failure)

    def finish(self) -> None:
        """Deletes all that is superfluous, and waits for it."""
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
    """Deletes under `path` the steps up to `step` that `policy` does not keep.

    It deletes all files of a step, whichever stages saved it: the run may have had others. The
    stages that share a folder may do so at once. A folder without a stage's files is a user's.

    Args:
        step: the step that was just saved.
        complete: the complete steps in order, of which `step` is the last.
        nonce: the same for all processes of a start.

    Raises:
        OSError: the disk fails.
    """
    steps = [s for s in step_folders(path) if s <= step and any(path.glob(f"{s}/prank_*"))]
    for old in _all_but_newest(steps, complete, policy.steps):
        delete_step(path / str(old), nonce)
    for old in _all_but_newest(steps, complete, policy.optimizer_states):
        for stage in manifest_stages(path / str(old)):
            with suppress(ValueError):  # a damaged manifest could not say what was dropped
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

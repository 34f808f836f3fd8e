"""Which checkpoints stay: older steps go, and optimizer state goes from those that stay.

Only what came before the step that was just saved is touched, once every stage has it whole and
`latest` names it. A step that not every stage has whole counts for none, and goes. One is renamed
aside before it is removed, and a manifest says what is gone before it goes: a crash at any moment
leaves a step whole, or gone, or saying what it lacks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from checkpoint.steps import folder as step_folder
from checkpoint.steps.complete import find_whole_steps
from checkpoint.steps.folder import step_folders, withdraw
from checkpoint.steps.manifest import StageManifest, manifest_stages, part_name, read_manifest
from comm.collective_io import BackgroundTask, run_on_all
from comm.communicator import Communicator
from common.files import replace_file


@dataclass(frozen=True)
class RetentionPolicy:
    """How many of the newest steps stay, and how many with optimizer state; None is all."""

    steps: int | None = None
    optimizer_states: int | None = None

    @property
    def is_all(self) -> bool:
        """Whether nothing is ever removed."""
        return self.steps is None and self.optimizer_states is None

    def added_bytes(self, saves: int, *, kept: tuple[int, int], weights: int, state: int) -> int:
        """The most that `saves` further checkpoints take at one time.

        `kept` are the steps that are there, and those of them with optimizer state; `weights` and
        `state` are the bytes of one. A new step is written before an old one goes.
        """
        limits = [most for most in (self.steps, self.optimizer_states) if most is not None]
        steps, states = (
            saves if most is None else min(saves, max(1, most + 1 - there))
            for most, there in ((self.steps, kept[0]), (min(limits, default=None), kept[1]))
        )
        return steps * weights + states * state


def prune(
    path: Path, step: int, keep: RetentionPolicy, *, whole: Sequence[int], nonce: str
) -> None:
    """Removes under `path`, where `step` was saved, what `keep` does not ask for.

    `whole` are the steps that count, those that all stages have whole, in order and with `step` the
    last: others go too. That is all of a step that is there, by whichever stages it was saved: the
    run may have had others. The stages of one folder may do so at once. OSError where the disk
    fails.
    """
    steps = [one for one in step_folders(path) if one <= step and _is_ours(path / str(one))]
    for old in _others(steps, whole, keep.steps):
        withdraw(path / str(old), nonce)
    for old in _others(steps, whole, keep.optimizer_states):
        if (path / str(old)).is_dir():
            _drop_optimizers(path / str(old))


def _is_ours(folder: Path) -> bool:
    """Nothing else that is called by a number is ever removed."""
    return any(folder.glob("prank_*"))


def _others(steps: Sequence[int], whole: Sequence[int], most: int | None) -> list[int]:
    """All but the newest `most` of those that are whole."""
    return [] if most is None else [step for step in steps if step not in whole[-most:]]


def _drop_optimizers(folder: Path) -> None:
    """Leaves alone what has no manifest to say so, or a damaged one."""
    for stage in manifest_stages(folder):
        with suppress(ValueError):
            _drop_optimizer(folder, read_manifest(folder, stage))


def _drop_optimizer(folder: Path, manifest: StageManifest) -> None:
    name = part_name(manifest.stage, "optimizer")
    if name not in manifest.dropped:
        files = {file: one for file, one in manifest.files.items() if file != name}
        told = replace(manifest, files=files, dropped=[*manifest.dropped, name])
        replace_file(folder / manifest.name, told.encode())
    (folder / name).unlink(missing_ok=True)


logger = logging.getLogger(__name__)


class _Begun(NamedTuple):
    """After which step older ones are removed, and by what, on a process that writes."""

    step: int
    task: BackgroundTask | None


class Removal:
    """Of older steps under `path`. Every process calls all of it alike but for `beside`.

    `path` is None on a process that writes no checkpoints.
    """

    def __init__(
        self, path: Path | None, keep: RetentionPolicy, *, control: Communicator, nonce: str
    ) -> None:
        self._path, self._keep, self._control, self._nonce = path, keep, control, nonce
        self._due: int | None = None  # a step that was saved, if nothing was removed for it yet
        self._begun: _Begun | None = None

    def note(self, step: int) -> None:
        """That step was saved."""
        self._due = step

    def begin(self) -> None:
        """Starts to remove what is older than the step noted; nothing is being removed before."""
        if self._due is None:
            return
        step, self._due = self._due, None
        whole = self._whole_steps(step)
        path = self._path
        task = None if path is None else BackgroundTask(partial(self._remove, path, step, whole))
        self._begun = _Begun(step, task)

    def wait(self) -> None:
        """Until what was begun has ended, on all; rank 0 warns where it failed."""
        if self._begun is None:
            return
        (step, task), self._begun = self._begun, None
        failure = run_on_all(self._control, task, f"removing what is older than step {step}")
        if failure is not None and self._control.rank == 0:
            logger.warning("older checkpoints could not be removed: %s", failure)

    def beside(self, write: Callable[[], None], *, hurry: bool) -> Callable[[], None]:
        """`write`, once what is being removed here has made room; with `hurry` at once, and again
        then where that failed."""
        task = None if self._begun is None else self._begun.task
        return write if task is None else partial(_write_beside, task, write, hurry=hurry)

    def _whole_steps(self, last: int) -> list[int]:
        """Those up to `last` that all stages have whole; none where nothing is to be removed."""
        if self._keep.is_all:
            return []
        return find_whole_steps(self._path, last, control=self._control) or []

    def _remove(self, path: Path, step: int, whole: Sequence[int]) -> None:
        step_folder.drop_replaced(path / str(step), self._nonce)
        if step in whole:
            prune(path, step, self._keep, whole=whole, nonce=self._nonce)


def _write_beside(removal: BackgroundTask, write: Callable[[], None], *, hurry: bool) -> None:
    if hurry:
        try:
            write()
            return
        except OSError:
            if removal.has_ended:
                raise
    removal.wait()
    write()

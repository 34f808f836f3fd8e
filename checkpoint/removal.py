"""What a save makes superfluous goes beside training, and what is written next waits for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from checkpoint.retention import Keep, prune
from checkpoint.steps import folder as step_folder
from checkpoint.steps.complete import find_whole_steps
from comm.collective_io import Background, do_together
from comm.communicator import Communicator

logger = logging.getLogger(__name__)


class _Begun(NamedTuple):
    """After which step older ones are removed, and by what, on a process that writes."""

    step: int
    task: Background | None


class Removal:
    """Of older steps under `path`. Every process calls all of it alike but for `beside`.

    `path` is None on a process that writes no checkpoints.
    """

    def __init__(self, path: Path | None, keep: Keep, *, control: Communicator, nonce: str) -> None:
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
        task = None if path is None else Background(partial(self._remove, path, step, whole))
        self._begun = _Begun(step, task)

    def wait(self) -> None:
        """Until what was begun has ended, on all; rank 0 warns where it failed."""
        if self._begun is None:
            return
        (step, task), self._begun = self._begun, None
        failure = do_together(self._control, task, f"removing what is older than step {step}")
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


def _write_beside(removal: Background, write: Callable[[], None], *, hurry: bool) -> None:
    if hurry:
        try:
            write()
            return
        except OSError:
            if removal.has_ended:
                raise
    removal.wait()
    write()

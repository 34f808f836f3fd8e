"""Training checkpoints: every stage saves together, every stage resumes from the same step.

No shared disk is needed. Replica 0 of each stage writes and reads that stage's files on its own
machine; the other replicas get weights and state from it over the network.
"""

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoint.files.checksums import sum_bytes, with_path
from checkpoint.resume.find import ResumeSearch
from checkpoint.resume.reshard import ResumeSplit
from checkpoint.retention import RetentionPolicy, StepDeleter
from checkpoint.steps import folder as step_folder
from checkpoint.steps.latest import LATEST, expect_latest, latest_text, write_latest
from checkpoint.steps.manifest import StageManifest, part_name
from checkpoint.steps.meta import META, StepMeta, read_meta
from comm.collective_io import BackgroundTask, run_on_all
from comm.communicator import Communicator
from comm.objects import broadcast_bytes, broadcast_json, gather_json
from comm.topology import Topology
from common.files import flush, replace_file

logger = logging.getLogger(__name__)


class SaveFailedError(OSError):
    """A step could not be saved; the earlier checkpoints are unchanged."""


class ResumePoint(NamedTuple):
    """The step that training goes on from, and its folder on replica 0's machines.

    `meta` is None for a predecessor's checkpoint, of which only the weights are used.
    """

    step: int
    folder: Path
    meta: StepMeta | None


class _PendingStep(NamedTuple):
    """A step that is being written: its folder, and the writing on a process that writes."""

    step: int
    folder: Path
    task: BackgroundTask | None


class CheckpointStore:
    """The checkpoints under one --checkpoint-path, as all processes of a run see them.

    Args:
        nonce: names this start of the run.
        extras: rank 0's small files (config.json, tokenizer) by name, for every step's folder.
        policy: the older steps that stay.
    """

    def __init__(
        self,
        path: Path,
        *,
        control: Communicator,
        topology: Topology,
        nonce: str,
        extras: Mapping[str, bytes],
        policy: RetentionPolicy,
    ) -> None:
        self.path, self._policy = path, policy
        self._control, self._topology, self._nonce = control, topology, nonce
        names = broadcast_json(control, list(extras))
        self._extras = {name: broadcast_bytes(control, extras.get(name, b"")) for name in names}
        self._search: ResumeSearch | None = None
        self._pending: _PendingStep | None = None
        self._writes = topology.replica == 0
        written = path if self._writes else None
        self._deleter = StepDeleter(written, policy, control=control, nonce=nonce)
        clear = partial(step_folder.clear_leftovers, path, nonce) if self._writes else None
        run_on_all(control, clear, "removing what earlier starts left", expected=())

    def begin(self, meta: StepMeta, *, parts: Mapping[str, Any]) -> None:
        """Starts to write `parts` (checkpoint, optimizer, scheduler) of this stage as `meta.step`.

        Every process calls it, and `finish` before the next `begin`. `parts` must not change until
        they are written. Rank 0's `meta` is saved.
        """
        assert self._pending is None, "one step is saved at a time"
        self._deleter.start()  # if it was left out after the last save
        text = broadcast_bytes(self._control, replace(meta, start=self._nonce).encode())
        folder = step_folder.partial_folder(self.path, meta.step, self._nonce)
        task = None
        if self._writes:
            write = partial(self._write, folder, meta.step, parts, text)
            task = BackgroundTask(partial(_write_or_retry, write, self._deleter.running))
        self._pending = _PendingStep(meta.step, folder, task)

    @property
    def pending(self) -> int | None:
        """The step that was begun and is not finished; the same for every process."""
        return None if self._pending is None else self._pending.step

    @property
    def is_writing(self) -> bool:
        """Whether this process still writes; if none does, `finish` only renames folders."""
        task = None if self._pending is None else self._pending.task
        return task is not None and not task.has_ended

    def finish(self) -> None:
        """Waits until the step that was begun is written, and publishes it; every process calls it.

        Raises SaveFailedError, the same on all processes, with rank and file if a disk failed: no
        step was added then, or `latest` alone does not name it.
        """
        assert self._pending is not None, "a step was begun"
        (step, folder, task), self._pending = self._pending, None
        final = self.path / str(step)

        def prepare() -> None:
            step_folder.move_aside(final, self._nonce)
            expect_latest(self.path)

        def drop() -> None:
            shutil.rmtree(folder, ignore_errors=True)

        def withdraw() -> None:
            drop()
            step_folder.delete_step(final, self._nonce)

        self._attempt(task, step, undo=drop)
        self._attempt(prepare, step, undo=drop)
        self._attempt(lambda: step_folder.publish(folder, final), step, undo=withdraw)
        self._attempt(lambda: write_latest(self.path, step), step)
        self._deleter.note_saved(step)

    def start_cleanup(self) -> None:
        """Starts to delete what the last save made superfluous; every process calls it."""
        self._deleter.start()

    def finish_cleanup(self) -> None:
        """Deletes what the saves made superfluous, and waits for it; every process calls it."""
        self._deleter.finish()

    def _attempt(
        self,
        work: Callable[[], None] | BackgroundTask | None,
        step: int,
        *,
        undo: Callable[[], None] | None = None,
    ) -> None:
        """Runs one part of a save on every writer; if it fails on one of them, all undo it.

        Without `undo` the step stays, complete, but `latest` does not name it.
        """
        work_here = work if self._writes else None
        failure = run_on_all(self._control, work_here, f"saving step {step}")
        if failure is None:
            return
        if undo is not None:  # a later start deletes what the failing disk does not delete now
            run_on_all(self._control, undo if self._writes else None, f"undoing step {step}")
        result = "is not saved" if undo is not None else "is saved, but latest does not name it"
        raise SaveFailedError(f"step {step} {result}: {failure}")

    def _write(self, partial: Path, step: int, parts: Mapping[str, Any], meta: bytes) -> None:
        """Writes this stage's files, those that every stage writes, and last the manifest."""
        topology = self._topology
        sums = step_folder.write_stage_files(partial, topology.stage, parts)
        common = {**self._extras, META: meta}
        sums |= {name: sum_bytes(content) for name, content in common.items()}
        save = f"{self._nonce}-{step}"
        manifest = StageManifest(step, topology.stage, topology.num_stages, save, sums)
        for name, content in {**common, manifest.name: manifest.encode()}.items():
            try:
                replace_file(partial / name, content)
            except OSError as error:
                raise with_path(error, partial / name) from error
        flush(partial)

    def needed_bytes(self, saves: int, *, weights: int, state: int) -> int:
        """Returns the most bytes that so many saves, each of `weights` and `state`, add here."""
        if not self._writes:
            return 0
        steps, pattern = step_folder.step_folders(self.path), part_name("*", "optimizer")
        present = len(steps), sum(any(self.path.glob(f"{step}/{pattern}")) for step in steps)
        return self._policy.added_bytes(saves, present=present, weights=weights, state=state)

    def find(self, split: ResumeSplit) -> ResumePoint | None:
        """Finds the newest step of which every stage has all files that it needs, if any.

        Every process calls it, and then `verify` before it uses any file of the step other than
        meta.json and config.json. `split` is the run's; the checkpoint may have another. ValueError
        as `ResumeSearch.newest_step`.
        """
        search = ResumeSearch(self.path, split, control=self._control, topology=self._topology)
        self._search = search
        step = search.newest_step()
        if step is not None:
            folder = self.path / str(step)
            value = read_meta(folder).to_json() if self._topology.rank == 0 else None
            meta = StepMeta.from_json(broadcast_json(self._control, value), folder / META)
            return ResumePoint(step, folder, meta)
        if search.predecessor is None:
            return None
        return ResumePoint(0, step_folder.predecessor_folder(self.path, search.predecessor), None)

    def verify(self, point: ResumePoint) -> None:
        """Checks all files of the step that `find` returned; ValueError names a damaged one.

        A predecessor's checkpoint has no checksums. Every process calls it.
        """
        if point.meta is not None:
            assert self._search is not None
            self._search.verify(point.step)

    def update_latest(self, step: int) -> None:
        """Makes `latest` name the step that the run goes on from.

        It is older after a crash between the rename of a folder and its own, and newer if the step
        that it names was moved away. No start relies on it alone, so a failing disk is a warning.
        """
        if not self._writes or latest_text(self.path) == str(step):
            return
        try:
            write_latest(self.path, step)
        except OSError as error:
            logger.warning("%s does not name step %d yet: %s", self.path / LATEST, step, error)

    def exists(self) -> bool:
        """Whether any stage has any checkpoint, complete or not; every process calls it."""
        has_checkpoint = self._writes and step_folder.any_steps(self.path)
        return any(gather_json(self._control, has_checkpoint))


def _write_or_retry(write: Callable[[], None], deletion: BackgroundTask | None) -> None:
    """Writes, and once more after `deletion` has freed space if the first attempt fails."""
    try:
        write()
    except OSError:
        if deletion is None:
            raise
        deletion.wait()
        write()


def read_part(path: Path) -> dict[str, Any]:
    """Opens the file of one part of a stage; ValueError names it if it cannot be read.

    Its tensors are mapped from the file: only those that are used are read.
    """
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises its own errors, pickle's, zip's and the system's
        raise ValueError(f"{path}: not readable: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a dict, found {type(state).__name__}")
    return state

"""Training checkpoints: all stages save together, and all stages resume from the same step.

No shared disk is needed. Replica 0 of each stage writes and reads the files of this stage on its
own machine. It sends weights and optimizer state to the other replicas over the network.
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
    """An error during the save of a checkpoint; the earlier checkpoints are unchanged."""


class ResumePoint(NamedTuple):
    """The step from which training resumes, and its folder on the machines of replica 0.

    `meta` is None for a checkpoint of an older system (a predecessor, see docs/glossary.md). From
    such a checkpoint only the weights are used, and `step` is 0.
    """

    step: int
    folder: Path
    meta: StepMeta | None


class _PendingStep(NamedTuple):
    """A step that is being written to `folder`; `task` is None if this process writes nothing."""

    step: int
    folder: Path
    task: BackgroundTask | None


class CheckpointStore:
    """The checkpoints of a run under --checkpoint-path; every process of the run has a store.

    Args:
        path: the value of --checkpoint-path.
        control: the group of all processes.
        topology: the stage and replica of this process.
        nonce: an id of this start of the program, the same for all processes.
        extras: the small files of rank 0 (config.json, tokenizer) by name; every step's folder gets
            a copy.
        policy: the number of steps to keep.
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
        run_on_all(control, clear, "removing incomplete files of earlier starts", expected=())

    def begin(self, meta: StepMeta, *, parts: Mapping[str, Any]) -> None:
        """Starts to write the checkpoint of step `meta.step` in the background.

        Every process must call it, and call `finish` before the next `begin`.

        Args:
            meta: the content of meta.json; only rank 0's content is saved.
            parts: this stage's data by key: "checkpoint" has the weights, and "optimizer" and
                "scheduler" have their state. The data must not change until the files are written.
        """
        assert self._pending is None, "one step is saved at a time"
        self._deleter.start()  # if it was not started after the last save
        text = broadcast_bytes(self._control, replace(meta, start=self._nonce).encode())
        folder = step_folder.partial_folder(self.path, meta.step, self._nonce)
        task = None
        if self._writes:
            write = partial(self._write, folder, meta.step, parts, text)
            task = BackgroundTask(partial(_write_or_retry, write, self._deleter.running))
        self._pending = _PendingStep(meta.step, folder, task)

    @property
    def pending(self) -> int | None:
        """Returns the step whose save has begun, or None after `finish`; all ranks agree on it."""
        return None if self._pending is None else self._pending.step

    @property
    def is_writing(self) -> bool:
        """Returns whether this process still writes files of the step `pending`.

        If no process still writes such files, `finish` only renames folders and is fast.
        """
        task = None if self._pending is None else self._pending.task
        return task is not None and not task.has_ended

    def finish(self) -> None:
        """Waits until the step `pending` is written, renames its folder, and updates `latest`.

        Every process must call it. The file `latest` contains the number of the newest saved step.

        Raises:
            SaveFailedError: a disk failed. The text names rank and file, and is the same on all
                processes. Either the step is not saved, or only `latest` could not be updated.
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
        """Starts to delete steps that `policy` does not keep; all ranks call it after a save."""
        self._deleter.start()

    def finish_cleanup(self) -> None:
        """Deletes steps that `policy` does not keep, and returns when done; all ranks call it."""
        self._deleter.finish()

    def _attempt(
        self,
        work: Callable[[], None] | BackgroundTask | None,
        step: int,
        *,
        undo: Callable[[], None] | None = None,
    ) -> None:
        """Runs `work`, one part of a save, on every process that writes files.

        If `work` fails on one of them, all run `undo`, and the step is not saved. `undo` is None if
        earlier parts have already saved the step; then nothing is undone.

        Raises:
            SaveFailedError: `work` failed on a process.
        """
        work_here = work if self._writes else None
        failure = run_on_all(self._control, work_here, f"saving step {step}")
        if failure is None:
            return
        if undo is not None:  # a later start deletes files that the failing disk keeps now
            run_on_all(self._control, undo if self._writes else None, f"undoing step {step}")
        result = "is not saved" if undo is not None else "is saved, but latest does not name it"
        raise SaveFailedError(f"step {step} {result}: {failure}")

    def _write(self, partial: Path, step: int, parts: Mapping[str, Any], meta: bytes) -> None:
        """Writes the stage's own files, then files that all stages write, and last the manifest."""
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
        """Returns the most bytes that the next checkpoints can add to the disk of this process.

        Args:
            saves: the number of checkpoints that will be saved.
            weights: the bytes of the stage's weights in one checkpoint.
            state: the bytes of the stage's optimizer state in one checkpoint.
        """
        if not self._writes:
            return 0
        steps, pattern = step_folder.step_folders(self.path), part_name("*", "optimizer")
        present = len(steps), sum(any(self.path.glob(f"{step}/{pattern}")) for step in steps)
        return self._policy.added_bytes(saves, present=present, weights=weights, state=state)

    def find(self, split: ResumeSplit) -> ResumePoint | None:
        """Returns the newest complete step, else a predecessor's checkpoint, else None.

        Every process must call `find`. The step is complete on all stages. At first a process may
        read only meta.json and config.json of the step. It may read other files when every process
        has called `verify`. `split` is the split of the run; the checkpoint can have another split.
        Raises ValueError as `ResumeSearch.newest_step` does.
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
        """Checks all files of the step that `find` returned; every process must call it.

        A predecessor's checkpoint has no checksums, so it is not checked.

        Raises:
            ValueError: a file is damaged; the text names the file.
        """
        if point.meta is not None:
            assert self._search is not None
            self._search.verify(point.step)

    def update_latest(self, step: int) -> None:
        """Writes the number `step`, from which the run resumes, to the file `latest`.

        After a crash during a save, `latest` can name an older step. If a user has moved the newest
        step away, `latest` names a newer step. The program can find the step without `latest`, so a
        disk error is only logged as a warning.
        """
        if not self._writes or latest_text(self.path) == str(step):
            return
        try:
            write_latest(self.path, step)
        except OSError as error:
            logger.warning(
                "%s could not be changed to step %d: %s", self.path / LATEST, step, error
            )

    def exists(self) -> bool:
        """Returns whether any stage has a checkpoint, complete or incomplete.

        Every process must call it.
        """
        has_checkpoint = self._writes and step_folder.any_steps(self.path)
        return any(gather_json(self._control, has_checkpoint))


def _write_or_retry(write: Callable[[], None], deletion: BackgroundTask | None) -> None:
    """Calls `write`; on an OSError while `deletion` runs, calls it again after the deletion."""
    try:
        write()
    except OSError:
        if deletion is None:
            raise
        deletion.wait()
        write()


def read_part(path: Path) -> dict[str, Any]:
    """Returns the content of the file `path`, for example the optimizer state of one stage.

    The tensors are memory-mapped, so a tensor is read from disk only when it is used.

    Raises:
        ValueError: the file cannot be read; the text names the file.
    """
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises errors of its own, of pickle, zip and the system
        raise ValueError(f"{path}: not readable: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a dict, found {type(state).__name__}")
    return state

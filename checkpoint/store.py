"""Training checkpoints: every stage saves together, every stage resumes from the same step.

No shared disk is assumed. Replica 0 of each stage writes and reads that stage's files on its own
machine; the other replicas get weights and state from it over the network.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from checkpoint.files.checksums import named, sum_bytes
from checkpoint.resume.find import Search
from checkpoint.resume.reshard import Continuation
from checkpoint.retention import Removal, RetentionPolicy
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
    """A step could not be saved; the checkpoints before it are as they were."""


class ResumePoint(NamedTuple):
    """Where training goes on: the step, and the folder that holds it on replica 0's machines.

    `meta` is its meta.json; None means a predecessor's checkpoint, of which only the weights count.
    """

    step: int
    folder: Path
    meta: StepMeta | None


class _PendingStep(NamedTuple):
    """A step that is being written: where, and by what, on a process that writes."""

    step: int
    folder: Path
    task: BackgroundTask | None


class CheckpointStore:
    """The checkpoints under one --checkpoint-path, as all processes of a run see them.

    `nonce` names this start of the run; `extras` are rank 0's small files (config.json, tokenizer)
    by name, which every step's folder holds; `keep` is what stays of older steps.
    """

    def __init__(
        self,
        path: Path,
        *,
        control: Communicator,
        topology: Topology,
        nonce: str,
        extras: Mapping[str, bytes],
        keep: RetentionPolicy,
    ) -> None:
        self.path, self._keep = path, keep
        self._control, self._topology, self._nonce = control, topology, nonce
        names = broadcast_json(control, list(extras))
        self._extras = {name: broadcast_bytes(control, extras.get(name, b"")) for name in names}
        self._search: Search | None = None
        self._pending: _PendingStep | None = None
        self._writes = topology.replica == 0
        self._removal = Removal(path if self._writes else None, keep, control=control, nonce=nonce)
        clear = partial(step_folder.clear_leftovers, path, nonce) if self._writes else None
        run_on_all(control, clear, "removing what earlier starts left", expected=())

    def begin(self, meta: StepMeta, *, parts: Mapping[str, Any], hurry: bool = False) -> None:
        """Starts writing `parts` (checkpoint, optimizer, scheduler) of this stage as `meta.step`.

        Every process calls it, and `finish` before it begins another; `meta` is rank 0's. What is
        written is not to change until it is. What the last save dropped makes room first; with
        `hurry`, only where there is none.
        """
        assert self._pending is None, "one step is saved at a time"
        step = meta.step
        text = broadcast_bytes(self._control, replace(meta, start=self._nonce).encode())
        folder = step_folder.partial_folder(self.path, step, self._nonce)
        write = partial(self._write, folder, step, parts, text)
        task = BackgroundTask(self._removal.beside(write, hurry=hurry)) if self._writes else None
        self._pending = _PendingStep(step, folder, task)

    @property
    def pending(self) -> int | None:
        """The step that was begun and is not finished; the same for every process."""
        return None if self._pending is None else self._pending.step

    @property
    def is_writing(self) -> bool:
        """Whether this process still writes: if none does, `finish` is a matter of renaming."""
        task = None if self._pending is None else self._pending.task
        return task is not None and not task.has_ended

    def finish(self, *, hurry: bool = False) -> None:
        """Lets the step that was begun be one, once all of it is written.

        Every process calls it. What --keep-checkpoints drops is removed beside training, until
        `tidy`; with `hurry`, all of that is left to `tidy`. SaveFailedError, the same on all of
        them, where a disk fails: it says on which rank and at which file, and no step was added, or
        `latest` alone could not be moved.
        """
        assert self._pending is not None, "a step was begun"
        (step, folder, task), self._pending = self._pending, None
        final = self.path / str(step)

        def drop() -> None:
            shutil.rmtree(folder, ignore_errors=True)

        def withdraw() -> None:
            drop()
            step_folder.withdraw(final, self._nonce)

        self._attempt(task, step, undo=drop)
        self._attempt(lambda: self._prepare(final), step, undo=drop)
        self._attempt(lambda: step_folder.publish(folder, final), step, undo=withdraw)
        self._attempt(lambda: write_latest(self.path, step), step)
        self._removal.note(step)
        if not hurry:
            self._removal.wait()  # as the write did
            self._removal.begin()

    def tidy(self) -> None:
        """Waits until what saves have dropped is removed; every process calls it."""
        self._removal.wait()
        self._removal.begin()
        self._removal.wait()

    def _attempt(
        self,
        work: Callable[[], None] | BackgroundTask | None,
        step: int,
        *,
        undo: Callable[[], None] | None = None,
    ) -> None:
        """One part of a save, by every writer; where it fails for one of them, all undo it.

        Without `undo` the step stays, whole, and it is `latest` that does not name it.
        """
        work_here = work if self._writes else None
        failure = run_on_all(self._control, work_here, f"saving step {step}")
        if failure is None:
            return
        if undo is not None:  # what the failing disk keeps all the same, a later start clears
            run_on_all(self._control, undo if self._writes else None, f"undoing step {step}")
        what = "is not saved" if undo is not None else "is saved, but latest does not name it"
        raise SaveFailedError(f"step {step} {what}: {failure}")

    def _write(self, partial: Path, step: int, parts: Mapping[str, Any], meta: bytes) -> None:
        """This stage's files, those that every stage writes, and last the manifest of them all."""
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
                raise named(error, partial / name) from error
        flush(partial)

    def _prepare(self, final: Path) -> None:
        step_folder.make_way(final, self._nonce)
        expect_latest(self.path)

    def bytes_to_come(self, saves: int, *, weights: int, state: int) -> int:
        """What so many saves will take here at most; `weights` and `state` are those of one."""
        if not self._writes:
            return 0
        folders = [self.path / str(step) for step in step_folder.step_folders(self.path)]
        states = sum(any(folder.glob(part_name("*", "optimizer"))) for folder in folders)
        return self._keep.added_bytes(
            saves, kept=(len(folders), states), weights=weights, state=state
        )

    def find(self, continuation: Continuation) -> ResumePoint | None:
        """The newest step of which every stage has all that it needs; None where no stage has any
        checkpoint.

        `continuation` tells the run's split after the checkpoint's, which may be of other stages.
        Files that stages have of different saves are not one step. Every process calls it, and
        `verify` before it uses what the step holds beside meta.json and config. ValueError, the
        same on all, names a file of the newest step that is damaged or missing, or says what each
        stage has, and lacks, where they have none in common.
        """
        search = Search(self.path, continuation, control=self._control, topology=self._topology)
        self._search = search
        step = search.newest()
        if step is not None:
            folder = self.path / str(step)
            meta = read_meta(folder).to_json() if self._topology.rank == 0 else None
            meta = broadcast_json(self._control, meta)
            return ResumePoint(step, folder, StepMeta.from_json(meta, folder / META))
        old = search.predecessor
        if old is None:
            return None
        return ResumePoint(0, step_folder.predecessor_folder(self.path, old), None)

    def verify(self, point: ResumePoint) -> None:
        """Reads and compares all files of what `find` found; ValueError as there.

        A predecessor's checkpoint has nothing to compare with. Every process calls it.
        """
        if point.meta is not None:
            assert self._search is not None
            self._search.verify(point.step)

    def continue_from(self, step: int) -> None:
        """Lets `latest` name the step that the run goes on from, where it does not.

        It may lag behind, after a crash between a folder's rename and its own; and it may be ahead,
        where the step that it names has been moved away. No start looks there alone, so that a
        disk that fails is a warning.
        """
        if not self._writes or latest_text(self.path) == str(step):
            return
        try:
            write_latest(self.path, step)
        except OSError as error:
            logger.warning("%s does not name step %d yet: %s", self.path / LATEST, step, error)

    def exists(self) -> bool:
        """Whether any stage has any checkpoint, whole or not; every process calls it."""
        mine = self._writes and step_folder.any_steps(self.path)
        return any(gather_json(self._control, mine))


def part_file(folder: Path, stage: int, part: str) -> Path:
    """Where `save` keeps one part of a stage."""
    return folder / part_name(stage, part)


def read_part(folder: Path, stage: int, part: str) -> dict[str, Any]:
    """What `save` kept of one part, its tensors mapped from the file, of which only those are read
    that are used; ValueError names the file where it cannot be read."""
    path = part_file(folder, stage, part)
    try:
        state = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises its own, pickle's, zip's and the system's
        raise ValueError(f"{path}: not readable: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"{path}: expected a dict, found {type(state).__name__}")
    return state

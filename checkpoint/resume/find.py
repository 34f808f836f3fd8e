"""Where training goes on: the newest step that every stage has, of one save, as it was written.

A save that a crash cut short leaves a step on some machines and not on others: the stages go back
to the step before, with a warning. A step that all had, of which a file is damaged or missing now,
is nothing that a crash does: it is an error, which offers the step before.

A step may have been saved by other stages than a run has: each stage then needs the files of those
that hold its modules, on its own machine.
"""

from __future__ import annotations

import logging
import socket
from pathlib import Path
from typing import Any, NamedTuple

from checkpoint.resume.inspect_step import StageRecord, file_names, look_at
from checkpoint.resume.reshard import Continuation
from checkpoint.steps import folder as step_folder
from checkpoint.steps.latest import check_latest, latest_text
from checkpoint.steps.manifest import manifest_name, read_manifest
from comm.collective_io import run_on_all
from comm.communicator import Communicator
from comm.objects import gather_json
from comm.topology import Topology
from pipeline_parallel.partition.split import Split

logger = logging.getLogger(__name__)


class StageView(NamedTuple):
    """What one stage has on its machine.

    steps: its record of each step that has a folder there.
    predecessor: the step of a predecessor's checkpoint that `latest` names.
    latest: what `latest` holds.
    problem: what is wrong with `latest`.
    host, path: the machine, and its --checkpoint-path.
    """

    steps: dict[int, StageRecord]
    predecessor: int | None
    latest: str | None
    problem: str | None
    host: str
    path: str


class Search:
    """Looks for the step to go on from, under one --checkpoint-path. Every process makes one."""

    def __init__(
        self,
        path: Path,
        continuation: Continuation,
        *,
        control: Communicator,
        topology: Topology,
    ) -> None:
        self._path, self._control, self._topology = path, control, topology
        self._continuation = continuation
        own = _look(path, topology.stage, continuation) if topology.replica == 0 else None
        views = gather_json(control, None if own is None else _encode(own))
        self._views = [_decode(view) for view in views[: topology.num_stages]]

    def newest(self) -> int | None:
        """The step of ours to go on from; None where there is none.

        Its meta.json, config and tokenizer have been read and compared, not yet its weights and
        state. ValueError, the same on all ranks, names the file that is damaged or missing, or says
        what each stage has where they have no step in common.
        """
        self._check_latest()
        common = self._common()
        if common:
            self._refuse_damaged(max(common), small=True)
            self._tell_going_back(max(common))
            return max(common)
        # `latest` is written when all stages are whole: without it no save ever ended. Where the
        # files come from other stages, though, they may have been brought here without it.
        saved = any(view.latest is not None for view in self._views)
        if self.predecessor is None and (saved or any(map(self._is_of_others, self._steps()))):
            raise ValueError(f"--checkpoint-path {self._path}: {self._disagreement()}")
        return None

    def verify(self, step: int) -> None:
        """Reads and compares all files of a step; ValueError as above."""
        self._refuse_damaged(step, small=False)
        if self._topology.rank == 0 and not self._views[0].steps[step].checked:
            logger.info("step %d is of a time without manifests: not verified", step)

    def _refuse_damaged(self, step: int, *, small: bool) -> None:
        """ValueError where a step is damaged; it names the newest whole one before it."""
        problem = self._problem(step, small=small)
        if problem is None:
            return
        older = sorted((other for other in self._common() if other < step), reverse=True)
        whole = next((other for other in older if self._problem(other, small=False) is None), None)
        if whole is None:
            raise ValueError(f"{problem}; no whole checkpoint before it is there")
        raise ValueError(
            f"{problem}; the newest whole checkpoint before it is step {whole}: to go on from "
            f"that, move {self._path / str(step)} away"
        )

    @property
    def predecessor(self) -> int | None:
        """The step of a predecessor's checkpoint that every stage has."""
        found = {view.predecessor for view in self._views}
        if len(found) > 1:
            raise ValueError(f"--checkpoint-path {self._path}: {self._disagreement()}")
        return found.pop()

    def _check_latest(self) -> None:
        for rank, view in enumerate(self._views):
            if view.problem is not None:
                raise ValueError(self._at(rank, view.problem))

    def _at(self, rank: int, problem: str) -> str:
        return f"on rank {rank}: {problem}" if self._control.size > 1 else problem

    def _common(self) -> list[int]:
        """The steps that every stage has had whole, not of different saves."""
        return [
            step
            for step in set.intersection(*(set(view.steps) for view in self._views))
            if all(view.steps[step].is_candidate for view in self._views)
            and len({view.steps[step].save for view in self._views} - {None}) <= 1
        ]

    def _problem(self, step: int, *, small: bool) -> str | None:
        """What is wrong with a step, in words: by its sizes, or else by reading its files, of which
        those that all stages have are `small`."""
        for rank, view in enumerate(self._views):
            if (problem := view.steps[step].problem) is not None:
                return self._at(rank, problem)
        if not self._views[0].steps[step].checked:
            return None
        folder, own = self._path / str(step), self._views[self._topology.stage]

        def read() -> None:
            for stage in own.steps[step].sources:
                manifest = read_manifest(folder, stage)
                manifest.check(folder, manifest.common_files if small else None)

        work = read if self._topology.replica == 0 else None
        what = f"reading step {step} to check it"
        return run_on_all(self._control, work, what, expected=ValueError)

    def _tell_going_back(self, step: int) -> None:
        if self._topology.rank != 0:
            return
        newer = {s for s in self._steps() if s > step}
        newer |= {
            int(view.latest)
            for view in self._views
            if view.latest is not None and view.latest.isdecimal() and int(view.latest) > step
        }
        if newer:
            logger.warning(
                "step %s is not whole on every stage, or not of one save: going back to %d",
                ", ".join(map(str, sorted(newer))),
                step,
            )
        for other in sorted(filter(self._is_of_others, newer)):
            logger.warning("step %d: %s", other, self._lacks(other))

    def _steps(self) -> list[int]:
        """All that have a folder anywhere."""
        return sorted({step for view in self._views for step in view.steps})

    def _told(self, step: int) -> StageRecord | None:
        """A record of the step that tells its split."""
        records = (view.steps.get(step) for view in self._views)
        return next((one for one in records if one is not None and one.split is not None), None)

    def _is_of_others(self, step: int) -> bool:
        """Whether the step is split otherwise than this run."""
        told = self._told(step)
        split = None if told is None else told.split
        return split is not None and self._continuation.is_change(split)

    def _lacks(self, step: int) -> str:
        """Which files of a step are to be brought where."""
        told, lacks = self._told(step), []
        for rank, view in enumerate(self._views):
            lack = view.steps[step].lack if step in view.steps else None
            if step not in view.steps and told is not None and told.split is not None:
                names = file_names(
                    self._continuation.sources(rank, told.split), checked=told.checked
                )
                lack = f"{names}, and with them config.json, meta.json and the tokenizer's files"
            if lack is not None:
                lacks.append(
                    f"rank {rank} on {view.host} needs in {Path(view.path) / str(step)} {lack}"
                )
        return "; ".join(lacks)

    def _disagreement(self) -> str:
        have = "; ".join(
            f"stage {stage} has {_steps(view)}" for stage, view in enumerate(self._views)
        )
        step = max(self._steps(), default=None)
        lacks = "" if step is None else self._lacks(step)
        needs = f"step {step}: {lacks}; " if lacks else ""
        return (
            f"no step is whole on every stage and of one save ({have}); {needs}bring the missing "
            "files to their machines, or name another folder"
        )


def _look(path: Path, stage: int, continuation: Continuation) -> StageView:
    steps = step_folder.step_folders(path)
    has_manifests = any(any((path / str(step)).glob(manifest_name("*"))) for step in steps)
    problem = None
    try:
        check_latest(path, has_manifests=has_manifests)
    except ValueError as error:
        problem = str(error)
    records = {step: look_at(path / str(step), stage, continuation) for step in steps}
    predecessor = step_folder.predecessor_step(path)
    host = socket.gethostname()
    return StageView(records, predecessor, latest_text(path), problem, host, str(path))


def _steps(view: StageView) -> str:
    steps = [str(step) for step, record in view.steps.items() if record.is_candidate]
    if view.predecessor is not None:
        steps.append(f"checkpoint_{view.predecessor}")
    return ", ".join(steps) or "none"


def _encode(view: StageView) -> list[Any]:
    return [[[step, record] for step, record in view.steps.items()], *view[1:]]


def _decode(view: list[Any]) -> StageView:
    records = {step: StageRecord(*record) for step, record in view[0]}
    for step, record in records.items():
        if record.split is not None:
            records[step] = record._replace(split=Split(record.split))
    return StageView(records, *view[1:])

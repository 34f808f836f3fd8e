"""Search for the step to resume from: the newest step for which each stage has the files it needs.

All files of a step must come from the same save. After a crash during a save, only some machines
have the new step. Then all stages resume from the previous step, and rank 0 logs a warning. No
crash damages a step that was complete on all stages. So a damaged or missing file of such a step is
an error; the error text says how to resume from the previous complete step.

A step can come from a run with another split into stages. Then the modules of a stage of this run
are in the files of one or more stages of the other run. The stage needs these files on its own
machine.
"""

import logging
import socket
from pathlib import Path
from typing import Any, NamedTuple

from checkpoint.resume.inspect_step import InspectedStep, inspect_step, name_files
from checkpoint.resume.reshard import ResumeSplit
from checkpoint.steps.folder import predecessor_step, step_folders
from checkpoint.steps.latest import check_latest, latest_text
from checkpoint.steps.manifest import manifest_name, read_manifest
from comm.collective_io import run_on_all
from comm.communicator import Communicator
from comm.objects import gather_json
from comm.topology import Topology
from pipeline_parallel.partition.split import Split

logger = logging.getLogger(__name__)


class StageView(NamedTuple):
    """The checkpoints on one stage's machine.

    steps: the state of each step that has a folder on the machine.
    predecessor: the step in `latest` if an older system (a predecessor, see docs/glossary.md)
        saved this step.
    latest: the text in the file `latest`.
    problem: an error text if the file `latest` is damaged.
    host, path: the name of the machine, and its --checkpoint-path.
    """

    steps: dict[int, InspectedStep]
    predecessor: int | None
    latest: str | None
    problem: str | None
    host: str
    path: str


class ResumeSearch:
    """The checkpoints of all stages under --checkpoint-path.

    Every process must create its instance at the same time, because the processes exchange data.
    """

    def __init__(
        self, path: Path, split: ResumeSplit, *, control: Communicator, topology: Topology
    ) -> None:
        self._path, self._split, self._control, self._topology = path, split, control, topology
        view = _inspect_machine(path, topology.stage, split) if topology.replica == 0 else None
        views = gather_json(control, None if view is None else _encode(view))
        self._views = [_decode(view) for view in views[: topology.num_stages]]

    def newest_step(self) -> int | None:
        """Returns the newest step that the run can resume from; None if no save was completed.

        Predecessors' checkpoints are ignored. The method verifies the step's meta.json, config and
        tokenizer, but not its weights and optimizer state.

        Raises:
            ValueError: a file is damaged or missing, or a save was completed but now no step is
                complete on every stage. All ranks raise the same error.
        """
        for rank, view in enumerate(self._views):
            if view.problem is not None:
                raise ValueError(self._on_rank(rank, view.problem))
        if common := self._common_steps():
            self.verify(max(common), small=True)
            self._warn_about_newer(max(common))
            return max(common)
        # A save ends by writing `latest`, so without `latest` no save was ever complete. The
        # exception are files of other stages, which a user may have copied without `latest`.
        has_saved = any(view.latest is not None for view in self._views)
        has_saved |= any(map(self._has_other_split, self._steps()))
        if has_saved and self.predecessor is None:
            raise ValueError(f"--checkpoint-path {self._path}: {self._describe_steps()}")
        return None

    def verify(self, step: int, *, small: bool = False) -> None:
        """Reads and checks every file that this run needs from `step`.

        `small` limits the check to the small files that every stage writes: meta.json, config,
        tokenizer.

        Raises:
            ValueError: a file is damaged or missing. The text names the file, and the newest
                complete step before this step. All ranks raise the same error.
        """
        problem = self._problem(step, small=small)
        if problem is None:
            return
        older = sorted(other for other in self._common_steps() if other < step)
        usable = next((s for s in reversed(older) if self._problem(s, small=False) is None), None)
        if usable is None:
            raise ValueError(f"{problem}; there is no complete checkpoint before this step")
        raise ValueError(
            f"{problem}; the newest complete checkpoint before it is step {usable}: to resume from "
            f"that step, move {self._path / str(step)} away"
        )

    @property
    def predecessor(self) -> int | None:
        """Returns the step of a predecessor's checkpoint that every stage has, or None.

        Raises ValueError if the stages have different steps.
        """
        steps = {view.predecessor for view in self._views}
        if len(steps) > 1:
            raise ValueError(f"--checkpoint-path {self._path}: {self._describe_steps()}")
        return steps.pop()

    def _on_rank(self, rank: int, problem: str) -> str:
        return f"on rank {rank}: {problem}" if self._control.size > 1 else problem

    def _common_steps(self) -> list[int]:
        """Returns the steps that were once complete on every stage, all files from the same save.

        Files of such a step can have been damaged or deleted later.
        """
        return [
            step
            for step in set.intersection(*(set(view.steps) for view in self._views))
            if all(view.steps[step].is_candidate for view in self._views)
            and len({view.steps[step].save for view in self._views} - {None}) <= 1
        ]

    def _problem(self, step: int, *, small: bool) -> str | None:
        """Returns an error text if files of a step are damaged, else None; the same on all ranks.

        The method first uses the results of `inspect_step`, and then reads the files.
        """
        for rank, view in enumerate(self._views):
            if (problem := view.steps[step].problem) is not None:
                return self._on_rank(rank, problem)
        folder = self._path / str(step)
        sources = self._views[self._topology.stage].steps[step].sources

        def read() -> None:
            for stage in sources:
                manifest = read_manifest(folder, stage)
                manifest.check(folder, manifest.common_files if small else None)

        work = read if self._topology.replica == 0 else None
        name = f"reading step {step} to check it"
        return run_on_all(self._control, work, name, expected=ValueError)

    def _warn_about_newer(self, step: int) -> None:
        if self._topology.rank != 0:
            return
        named = [int(v.latest) for v in self._views if v.latest and v.latest.isdecimal()]
        if newer := {other for other in (*self._steps(), *named) if other > step}:
            logger.warning(
                "step %s is not complete on every stage, or has files of different saves: going "
                "back to step %d",
                ", ".join(map(str, sorted(newer))),
                step,
            )
        for other in sorted(filter(self._has_other_split, newer)):
            logger.warning("step %d: %s", other, self._describe_missing(other))

    def _steps(self) -> list[int]:
        """Returns all steps that have a folder on any machine."""
        return sorted({step for view in self._views for step in view.steps})

    def _saved_split(self, step: int) -> Split | None:
        """Returns the split that a step was saved with; None if no machine knows the split."""
        records = (view.steps[step] for view in self._views if step in view.steps)
        return next((record.split for record in records if record.split is not None), None)

    def _has_other_split(self, step: int) -> bool:
        split = self._saved_split(step)
        return split is not None and self._split.differs_from(split)

    def _describe_missing(self, step: int) -> str:
        """Returns a text that lists the missing files of a step, for each machine."""
        split, needs = self._saved_split(step), []
        for rank, view in enumerate(self._views):
            missing = view.steps[step].missing if step in view.steps else None
            if step not in view.steps and split is not None:
                names = name_files(self._split.sources(rank, split))
                missing = f"{names}, and also config.json, meta.json and the tokenizer's files"
            if missing is not None:
                place = Path(view.path) / str(step)
                needs.append(f"rank {rank} on {view.host} needs in {place} {missing}")
        return "; ".join(needs)

    def _describe_steps(self) -> str:
        """Returns an error text for stages without a common step; it lists each stage's steps."""
        have = "; ".join(
            f"stage {stage} has {_list_steps(view)}" for stage, view in enumerate(self._views)
        )
        step = max(self._steps(), default=0)
        missing = self._describe_missing(step)
        needs = f"step {step}: {missing}; " if missing else ""
        return (
            f"no step of one save is complete on every stage ({have}); {needs}copy the missing "
            "files to their machines, or choose another folder"
        )


def _inspect_machine(path: Path, stage: int, split: ResumeSplit) -> StageView:
    steps = step_folders(path)
    has_manifests = any(any((path / str(step)).glob(manifest_name("*"))) for step in steps)
    problem = None
    try:
        check_latest(path, has_manifests=has_manifests)
    except ValueError as error:
        problem = str(error)
    records = {step: inspect_step(path / str(step), stage, split) for step in steps}
    host = socket.gethostname()
    return StageView(records, predecessor_step(path), latest_text(path), problem, host, str(path))


def _list_steps(view: StageView) -> str:
    steps = [str(step) for step, record in view.steps.items() if record.is_candidate]
    if view.predecessor is not None:
        steps.append(f"checkpoint_{view.predecessor}")
    return ", ".join(steps) or "none"


def _encode(view: StageView) -> list[Any]:
    return [[[step, record] for step, record in view.steps.items()], *view[1:]]


def _decode(view: list[Any]) -> StageView:
    records = {}
    for step, fields in view[0]:
        record = InspectedStep(*fields)
        split = None if record.split is None else Split(record.split)
        records[step] = record._replace(split=split)
    return StageView(records, *view[1:])

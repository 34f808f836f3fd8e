"""Complete steps: saved steps for which each stage still has all files that it wrote.

After a crash during a save, or after a disk was replaced, a step is on some machines only. No run
can resume from such a step, and --keep-checkpoints does not count it.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from checkpoint.steps.folder import step_folders
from checkpoint.steps.manifest import manifest_stages, read_manifest
from comm.collective_io import run_on_all
from comm.communicator import Communicator
from comm.objects import gather_json

logger = logging.getLogger(__name__)


class StageFiles(NamedTuple):
    """The record that a disk has all files that one stage wrote in one save.

    `save` is the id of this save, and `num_stages` is the number of stages that took part in it.
    """

    save: str
    num_stages: int
    stage: int


def find_complete_steps(path: Path | None, last: int, *, control: Communicator) -> list[int] | None:
    """Returns the steps up to `last` that are complete on all stages; checks only file sizes.

    Every process must call it at the same time, and all get the same result. `path` is None for a
    process that writes no checkpoints. If a disk cannot be read, the result is None, and rank 0
    logs a warning.
    """
    files: dict[int, list[StageFiles]] = {}

    def inspect() -> None:
        assert path is not None
        for step in step_folders(path):
            if step <= last:
                files[step] = _inspect_folder(path / str(step), step)

    name = f"checking the files of checkpoints up to step {last}"
    failure = run_on_all(control, None if path is None else inspect, name)
    disks = gather_json(control, None if path is None else list(files.items()))
    if failure is not None:
        if control.rank == 0:
            logger.warning(
                "older checkpoints are not deleted, because one of them cannot be read: %s", failure
            )
        return None
    return complete_steps(
        [
            {step: [StageFiles(*values) for values in of_step] for step, of_step in disk}
            for disk in disks
            if disk is not None
        ]
    )


def complete_steps(disks: Sequence[Mapping[int, Sequence[StageFiles]]]) -> list[int]:
    """Returns the sorted complete steps; for each disk, `disks` maps a step to its stages there."""
    steps = {step for disk in disks for step in disk}
    return sorted(step for step in steps if _is_complete([disk.get(step, ()) for disk in disks]))


def _is_complete(disks: Sequence[Sequence[StageFiles]]) -> bool:
    """Returns whether, for one save of a step, each stage's disk has all files of this stage.

    `disks` is in the order of the stages. If more or fewer stages took part in the save than
    there are disks now, its files can be on any of the disks.
    """
    available = {files for disk in disks for files in disk}
    for save, num_stages in {(files.save, files.num_stages) for files in available}:
        needed = [StageFiles(save, num_stages, stage) for stage in range(num_stages)]
        if num_stages == len(disks):
            if all(files in disk for files, disk in zip(needed, disks, strict=True)):
                return True
        elif available.issuperset(needed):
            return True
    return False


def _inspect_folder(folder: Path, step: int) -> list[StageFiles]:
    """Returns the stages whose files in `folder` are complete.

    Raises OSError if the disk fails, because a disk error does not mean that a file is missing.
    """
    complete = []
    for stage in manifest_stages(folder):
        try:
            manifest = read_manifest(folder, stage)
            manifest.check_sizes(folder)
        except ValueError as error:
            cause = error.__cause__
            if isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError):
                raise cause from error
            continue
        if manifest.step == step:
            complete.append(StageFiles(manifest.save, manifest.num_stages, stage))
    return complete

"""What one stage has of a step: all of a save, a damaged one, or not all of any."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from checkpoint.step_folder import is_whole, save_of
from checkpoint.step_manifest import num_stages, part_name, read_manifest


class StageRecord(NamedTuple):
    """A stage's view of a step's folder on its machine, as far as its files' sizes tell.

    save: what the step's other stages have too if they are of the same save; None where it cannot
        be told.
    problem: names the first file that is not as it was written, or that has been dropped.
    checked: whether there is a manifest to hold the files against.

    A folder with neither save nor problem never was whole here.
    """

    save: str | None = None
    problem: str | None = None
    checked: bool = True

    @property
    def is_candidate(self) -> bool:
        """Whether the step was whole here once."""
        return self.save is not None or self.problem is not None


def look_at(folder: Path, stage: int) -> StageRecord:
    """The record of one step's folder."""
    try:
        stages = num_stages(folder)
        if stages is None:
            return StageRecord(save_of(folder) if is_whole(folder, stage) else None, checked=False)
        if stage >= stages:
            return StageRecord()
        manifest = read_manifest(folder, stage)
    except ValueError as error:
        return StageRecord(problem=str(error))
    if part_name(stage, "optimizer") in manifest.dropped:
        return StageRecord(
            manifest.save,
            f"{folder / part_name(stage, 'optimizer')}: dropped (--keep-optimizer-states): the "
            "step can be converted, but training cannot go on from it",
        )
    try:
        manifest.check_sizes(folder)
    except ValueError as error:
        return StageRecord(manifest.save, str(error))
    return StageRecord(manifest.save)

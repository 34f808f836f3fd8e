"""What one stage has of a step: all that it needs of a save, a damaged one, or not all of any."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from checkpoint.resume.reshard import Continuation
from checkpoint.resume.saved_split import saved_split
from checkpoint.steps.folder import not_whole, save_of
from checkpoint.steps.manifest import (
    StageManifest,
    any_manifest,
    check_meta_step,
    check_one_save,
    num_stages,
    part_name,
    read_manifest,
)
from checkpoint.steps.meta import read_meta
from pipeline_parallel.partition.split import Split


class StageRecord(NamedTuple):
    """A stage's view of a step's folder on its machine, as far as its files' sizes tell.

    save: what the step's other stages have too if they are of the same save; None where it cannot
        be told.
    problem: names the first file that is not as it was written, or of another step or save than its
        folder, or that has been dropped.
    checked: whether there is a manifest to hold the files against.
    split: how the save is split; None where that cannot be told.
    sources: the save's stages whose files this stage needs.
    lack: what of these is not here, in words.

    A folder with neither save nor problem never was whole here.
    """

    save: str | None = None
    problem: str | None = None
    checked: bool = True
    split: Split | None = None
    sources: Sequence[int] = ()
    lack: str | None = None

    @property
    def is_candidate(self) -> bool:
        """Whether all that this stage needs of the step was whole here once."""
        return self.save is not None or self.problem is not None


def look_at(folder: Path, stage: int, continuation: Continuation) -> StageRecord:
    """The record of one step's folder, for a run that is split as `continuation` says."""
    try:
        stages = num_stages(folder)
        split = _split_of(folder, sum(continuation.chosen))
        sources = [stage] if split is None else continuation.sources(stage, split)
        found = StageRecord(checked=stages is not None, split=split, sources=sources)
        if stages is None:
            return _look_unchecked(folder, found)
        if split is None and stage >= stages:
            return found
        # What another stage wrote may never have been brought here; what this one wrote was here.
        is_change = split is not None and continuation.is_change(split)
        absent = [one for one in sources if is_change and not any(folder.glob(f"prank_{one}_*"))]
        if absent:
            return found._replace(lack=file_names(absent))
        return _look_checked(folder, found, [read_manifest(folder, one) for one in sources])
    except ValueError as error:
        return StageRecord(problem=str(error))


def file_names(stages: Sequence[int], *, checked: bool = True) -> str:
    """The files that stages write for themselves, as a shell spells them too, in one word each."""
    ends = ["checkpoint.pt", "optimizer.pt", "scheduler.pt", *["manifest.json"] * checked]
    return ", ".join(f"prank_{one}_{{{','.join(ends)}}}" for one in stages)


def _split_of(folder: Path, model_layers: int) -> Split | None:
    """ValueError where meta.json is not as it was written, or of another step; None where it tells
    no split of the model, which is told once it is known to be of the step to go on from."""
    path, manifest = folder / "meta.json", any_manifest(folder)
    if manifest is not None:
        _check_step(folder, manifest)
        manifest.check(folder, [path.name])
        check_meta_step(folder, int(folder.name), of="its folder")
    try:
        return saved_split(read_meta(folder), folder, model_layers=model_layers)
    except ValueError:
        return None


def _check_step(folder: Path, manifest: StageManifest) -> None:
    """ValueError names a manifest that is of another step than its folder's name says."""
    if manifest.step != int(folder.name):
        raise ValueError(
            f"{folder / manifest.name}: of step {manifest.step}, but its folder is of {folder.name}"
        )


def _look_unchecked(folder: Path, found: StageRecord) -> StageRecord:
    if absent := not_whole(folder, found.sources):
        return found._replace(lack=", ".join(absent))
    check_meta_step(folder, int(folder.name), of="its folder")
    return found._replace(save=save_of(folder))


def _look_checked(
    folder: Path, found: StageRecord, manifests: Sequence[StageManifest]
) -> StageRecord:
    for one in manifests:
        _check_step(folder, one)
    first = any_manifest(folder)
    assert first is not None, "some have been read"
    check_one_save(folder, [first, *manifests])
    found = found._replace(save=manifests[0].save)
    for one in manifests:
        dropped = part_name(one.stage, "optimizer")
        if dropped in one.dropped:
            return found._replace(
                problem=f"{folder / dropped}: dropped (--keep-optimizer-states): the step can be "
                "converted, but training cannot go on from it"
            )
        try:
            one.check_sizes(folder)
        except ValueError as error:
            return found._replace(problem=str(error))
    return found

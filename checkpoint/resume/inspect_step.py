"""Inspection of a step's folder for one stage: is it complete, or which file is bad or missing?"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from checkpoint.resume.reshard import ResumeSplit
from checkpoint.resume.saved_split import saved_split
from checkpoint.steps.manifest import (
    StageManifest,
    check_one_save,
    check_step,
    count_stages,
    first_manifest,
    part_name,
    read_manifest,
)
from checkpoint.steps.meta import META, read_meta
from pipeline_parallel.partition.split import Split


class InspectedStep(NamedTuple):
    """The state of a step's folder on a stage's machine; large files are checked only for size.

    save: the id of the save; it is the same for all stages of one save.
    problem: an error text for the first file that is damaged, deleted, or of another step or save.
    split: the split of the layers in the save; None if the split is not known.
    sources: the stages of the save whose files this stage needs.
    missing: a text that lists the missing files of `sources`.

    If both `save` and `problem` are None, the folder was never complete on this machine.
    """

    save: str | None = None
    problem: str | None = None
    split: Split | None = None
    sources: Sequence[int] = ()
    missing: str | None = None

    @property
    def is_candidate(self) -> bool:
        """Returns whether this machine ever had all the step's files that the stage needs."""
        return self.save is not None or self.problem is not None


def inspect_step(folder: Path, stage: int, split: ResumeSplit) -> InspectedStep:
    """Returns the state of a step's folder for `stage` of a run with the split `split`."""
    try:
        num_stages = count_stages(folder)
        if num_stages is None:
            return InspectedStep()
        saved = _saved_split(folder, model_layers=sum(split.resolved))
        sources = [stage] if saved is None else split.sources(stage, saved)
        record = InspectedStep(split=saved, sources=sources)
        if saved is None and stage >= num_stages:
            return record
        # With another split the stage needs files of other stages, which the user may not have
        # copied to this machine yet. Otherwise it needs its own files, which were written here.
        if saved is not None and split.differs_from(saved):
            absent = [source for source in sources if not any(folder.glob(f"prank_{source}_*"))]
            if absent:
                return record._replace(missing=name_files(absent))
        return _check_manifests(folder, record, [read_manifest(folder, s) for s in sources])
    except ValueError as error:
        return InspectedStep(problem=str(error))


def name_files(stages: Sequence[int]) -> str:
    """Returns shell patterns for the files that the given stages write."""
    ends = "checkpoint.pt,optimizer.pt,scheduler.pt,manifest.json"
    return ", ".join(f"prank_{stage}_{{{ends}}}" for stage in stages)


def _saved_split(folder: Path, *, model_layers: int) -> Split | None:
    """Returns the split in meta.json, or None if its sum is not `model_layers`.

    If the result is None, an attempt to resume from the step raises an error later.

    Raises:
        ValueError: meta.json or the manifest is damaged or of another step.
    """
    if manifest := first_manifest(folder):
        _check_in_folder(folder, manifest.name, manifest.step)
        manifest.check(folder, [META])
        _check_in_folder(folder, META, read_meta(folder).step)
    try:
        return saved_split(read_meta(folder), folder, model_layers=model_layers)
    except ValueError:
        return None


def _check_in_folder(folder: Path, name: str, step: int) -> None:
    check_step(folder / name, step, expected=int(folder.name), owner="its folder")


def _check_manifests(
    folder: Path, record: InspectedStep, manifests: Sequence[StageManifest]
) -> InspectedStep:
    for manifest in manifests:
        _check_in_folder(folder, manifest.name, manifest.step)
    first = first_manifest(folder)
    assert first is not None, "manifests of this folder have been read"
    check_one_save(folder, [first, *manifests])
    record = record._replace(save=manifests[0].save)
    for manifest in manifests:
        optimizer = part_name(manifest.stage, "optimizer")
        if optimizer in manifest.dropped:
            return record._replace(
                problem=f"{folder / optimizer}: deleted (--keep-optimizer-states): the step can be "
                "converted, but training cannot resume from it"
            )
        try:
            manifest.check_sizes(folder)
        except ValueError as error:
            return record._replace(problem=str(error))
    return record

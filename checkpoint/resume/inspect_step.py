"""Inspects one step's folder for one stage: complete, damaged, or without files that it needs."""

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
    """A step's folder on a stage's machine, judged by the sizes of its files.

    save: the id of the save, which the step's other stages share.
    problem: names the first file that is damaged, dropped, or of another step or save.
    split: the split of the layers in the save, if it is known.
    sources: the save's stages whose files this stage needs.
    missing: the files of these stages that are not here, in words.

    A folder with neither save nor problem was never complete here.
    """

    save: str | None = None
    problem: str | None = None
    split: Split | None = None
    sources: Sequence[int] = ()
    missing: str | None = None

    @property
    def is_candidate(self) -> bool:
        """Whether all files that this stage needs of the step were complete here once."""
        return self.save is not None or self.problem is not None


def inspect_step(folder: Path, stage: int, split: ResumeSplit) -> InspectedStep:
    """Returns the record of one step's folder for a stage of a run with that split."""
    try:
        num_stages = count_stages(folder)
        if num_stages is None:
            return InspectedStep()
        saved = _saved_split(folder, model_layers=sum(split.resolved))
        sources = [stage] if saved is None else split.sources(stage, saved)
        record = InspectedStep(split=saved, sources=sources)
        if saved is None and stage >= num_stages:
            return record
        # Another stage's files may never have been copied here; this stage's own were written here.
        if saved is not None and split.differs_from(saved):
            absent = [source for source in sources if not any(folder.glob(f"prank_{source}_*"))]
            if absent:
                return record._replace(missing=name_files(absent))
        return _check_manifests(folder, record, [read_manifest(folder, s) for s in sources])
    except ValueError as error:
        return InspectedStep(problem=str(error))


def name_files(stages: Sequence[int]) -> str:
    """Returns the patterns, as a shell expands them, of the files that stages write."""
    ends = "checkpoint.pt,optimizer.pt,scheduler.pt,manifest.json"
    return ", ".join(f"prank_{stage}_{{{ends}}}" for stage in stages)


def _saved_split(folder: Path, *, model_layers: int) -> Split | None:
    """Returns the split in meta.json; ValueError if that is damaged or of another step.

    None stands for a split of another model, which is an error once this step is to be resumed.
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
    assert first is not None, "some have been read"
    check_one_save(folder, [first, *manifests])
    record = record._replace(save=manifests[0].save)
    for manifest in manifests:
        optimizer = part_name(manifest.stage, "optimizer")
        if optimizer in manifest.dropped:
            return record._replace(
                problem=f"{folder / optimizer}: dropped (--keep-optimizer-states): the step can be "
                "converted, but training cannot go on from it"
            )
        try:
            manifest.check_sizes(folder)
        except ValueError as error:
            return record._replace(problem=str(error))
    return record

"""The manifests of a step's folder: each stage writes one that lists all files that it wrote.

All stages of a save write the same meta.json, config and tokenizer, so each manifest is valid both
for a folder of its own and for a folder that the stages share.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from checkpoint.files import checksums
from checkpoint.files.checksums import FileSum, check_file, check_size
from checkpoint.steps.meta import META, is_predecessors, read_meta


@dataclass(frozen=True)
class StageManifest:
    """The files that one stage wrote in one save.

    save: an id that the stages of a save share, and no two saves.
    files: checksums by name, of the stage's own files and of those that every stage writes.
    dropped: files that were deleted later, to make room.
    """

    step: int
    stage: int
    num_stages: int
    save: str
    files: Mapping[str, FileSum]
    dropped: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return manifest_name(self.stage)

    @property
    def common_files(self) -> list[str]:
        """The files that every stage writes: meta.json, config, tokenizer."""
        return [name for name in self.files if not name.startswith("prank_")]

    def encode(self) -> bytes:
        """Returns the file's content."""
        return checksums.seal({**vars(self), "files": checksums.encode_sums(self.files)})

    def check_sizes(self, folder: Path) -> None:
        """Raises ValueError for the first file of `folder` that is missing or of another size."""
        for name, expected in self.files.items():
            check_size(folder / name, expected, manifest=self.name)

    def check(self, folder: Path, names: Iterable[str] | None = None) -> None:
        """Reads all files, or those `names`; ValueError names the first that is damaged."""
        for name in self.files if names is None else names:
            check_file(folder / name, self.files[name], manifest=self.name)


def part_name(stage: int | str, part: str) -> str:
    """Returns the file name of one part of a stage; "*" gives a pattern for all stages."""
    return f"prank_{stage}_{part}.pt"


def manifest_name(stage: int | str) -> str:
    """Returns the file name of a stage's manifest; "*" gives a pattern for all stages."""
    return f"prank_{stage}_manifest.json"


def read_manifest(folder: Path, stage: int) -> StageManifest:
    """Reads a stage's manifest; ValueError names it if it is damaged or of another stage."""
    path = folder / manifest_name(stage)
    body = checksums.unseal(path)
    if body["stage"] != stage:
        raise ValueError(f"{path}: of stage {body['stage']}, which its name does not say")
    del body["format"]
    return StageManifest(**{**body, "files": checksums.decode_sums(body)})


def count_stages(folder: Path) -> int | None:
    """Returns the number of stages that saved a step, from a manifest or else from meta.json.

    None stands for a predecessor's step. ValueError names a damaged file.
    """
    if manifest := first_manifest(folder):
        return manifest.num_stages
    return None if is_predecessors(folder) else len(read_meta(folder).num_layers)


def manifest_stages(folder: Path) -> list[int]:
    """Returns the stages that have a manifest in a step's folder."""
    names = (path.name for path in folder.glob(manifest_name("*")))
    matches = (re.fullmatch(manifest_name("([0-9]+)"), name) for name in names)
    return sorted(int(match[1]) for match in matches if match)


def first_manifest(folder: Path) -> StageManifest | None:
    """Reads the first manifest of a step's folder, if any; ValueError names a damaged one."""
    stages = manifest_stages(folder)
    return read_manifest(folder, stages[0]) if stages else None


def check_one_save(folder: Path, manifests: Sequence[StageManifest]) -> None:
    """Raises ValueError for the first manifest that is not of the first one's step and save."""
    first = manifests[0]
    for manifest in manifests:
        check_step(folder / manifest.name, manifest.step, expected=first.step, owner=first.name)
        if manifest.save != first.save:
            raise ValueError(f"{folder / manifest.name}: of another save than {first.name}")


def check_step(path: Path, actual: int, *, expected: int, owner: str) -> None:
    """Raises ValueError if the step of `path` is not the `expected` one of its `owner`."""
    if actual != expected:
        raise ValueError(f"{path}: of step {actual}, but {owner} is of {expected}")


def check_weights(folder: Path, *, companions: bool) -> bool:
    """Verifies all files that a conversion of a step reads.

    These are the weights of all stages, meta.json and, with `companions`, config and tokenizer. The
    folder may have any name, but its files must agree. ValueError names the first file that is
    missing, damaged, or of another step or save. False stands for a predecessor's step, which has
    no manifests.
    """
    num_stages = count_stages(folder)
    if num_stages is None:
        return False
    manifests = [read_manifest(folder, stage) for stage in range(num_stages)]
    check_one_save(folder, manifests)
    for manifest in manifests:
        manifest.check(folder, [part_name(manifest.stage, "checkpoint")])
    first = manifests[0]
    first.check(folder, first.common_files if companions else [META])
    check_step(folder / META, read_meta(folder).step, expected=first.step, owner=first.name)
    return True
